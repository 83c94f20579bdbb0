"""What a user of `mine` gets wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.mistakes import PAIRS, Mistake


def mine(*more: str, pairs: str = "p.jsonl", output: str = "m.jsonl") -> tuple[str, ...]:
    return ("mine", "--model", "MODEL", "--pairs", f"TMP/{pairs}", "--output", f"TMP/{output}", *more)


MISTAKES = {
    "no pairs to mine": Mistake("data file TMP/p.jsonl not found (relative paths start at ROOT)", mine()),
    "pairs without columns": Mistake(
        "TMP/texts.txt: pairs need columns: use .jsonl, .json, .csv, .tsv or .parquet",
        mine(pairs="texts.txt"),
    ),
    "no such column of pairs": Mistake(
        "TMP/p.jsonl, line 1: no column 'question': set --query-column to one of query, positive",
        mine("--query-column", "question"),
        files=PAIRS,
    ),
    "no such column of the corpus": Mistake(
        "TMP/c.jsonl, line 1: no column 'text': set --corpus-column to one of title",
        mine("--corpus", "TMP/c.jsonl"),
        files=PAIRS | {"c.jsonl": b'{"title": "rain"}\n'},
    ),
    "blank corpus": Mistake(
        "--corpus holds no text", mine("--corpus", "TMP/c.txt"), files=PAIRS | {"c.txt": b" \n"}
    ),
    "blank pairs": Mistake(
        "--pairs holds no pair", mine(), files={"p.jsonl": b'{"query": "", "positive": "trout"}\n'}
    ),
    "ranks reversed": Mistake(
        "--first-rank 60 is above --last-rank 50: swap them", mine("--first-rank", "60"), files=PAIRS
    ),
    "too few ranks": Mistake(
        "--negatives 5 is more than the 3 ranks from 48 to 50: raise --last-rank",
        mine("--first-rank", "48"),
        files=PAIRS,
    ),
    "unknown sampling": Mistake(
        "--sampling 'best' is unknown: choose top or random", mine("--sampling", "best"), files=PAIRS
    ),
    "a margin without end": Mistake(
        "--margin inf is not a finite number: give one such as 0.05", mine("--margin", "inf"), files=PAIRS
    ),
    "a ratio over 1": Mistake(
        "--ratio 95.0 must be above 0 and at most 1: give one such as 0.95",
        mine("--ratio", "95"),
        files=PAIRS,
    ),
    "a reranker's margin without one": Mistake(
        "--reranker-margin does nothing without --reranker: give one, or leave it out",
        mine("--reranker-margin", "0.1"),
        files=PAIRS,
    ),
    "no such reranker": Mistake(
        "--reranker TMP/none: there is no such folder",
        mine("--reranker", "TMP/none"),
        files=PAIRS,
    ),
    "mined already": Mistake(
        "--output TMP/m.jsonl exists: choose another, or give --overwrite",
        mine(),
        files=PAIRS | {"m.jsonl": b"precious"},
    ),
    "mined into another format": Mistake(
        "--output TMP/m.csv must end in .jsonl", mine(output="m.csv"), files=PAIRS
    ),
    "mined into no folder": Mistake(
        "--output TMP/texts.txt/m.jsonl cannot be written: Not a directory: choose a path that you can write "
        "to",
        mine(output="texts.txt/m.jsonl"),
        files=PAIRS,
    ),
    "mined by no model": Mistake(
        "model 'TMP/none' cannot be loaded: …",
        ("mine", "--model", "TMP/none", "--pairs", "TMP/p.jsonl", "--output", "TMP/m.jsonl"),
        files=PAIRS,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])
