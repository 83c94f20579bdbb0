"""What a user of `demo` gets wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.mistakes import Mistake

MISTAKES = {
    "unknown budget": Mistake(
        "--budget 'huge' is not one of quick, default, full",
        ("demo", "--output", "TMP/demo", "--budget", "huge"),
    ),
    "no graded pairs": Mistake(
        "TMP/p.csv cannot be read: …No such file or directory…",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
    ),
    "pairs without score": Mistake(
        "TMP/p.csv, line 1: expected sentence1, sentence2, score (a number)",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
        files={"p.csv": b"one,two\n"},
    ),
    "pairs with other names": Mistake(
        "TMP/p.csv, line 1: the score 'sim' is no number: the columns need the names sentence1, sentence2, "
        "score, or this order without a header",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
        files={"p.csv": b"a,b,sim\none,two,3\n"},
    ),
    "a decimal comma": Mistake(
        "TMP/p.csv, line 2: the score '3,5' is no number: write it as 3.5",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
        files={"p.csv": b"one;two;3\none;three;3,5\n"},
    ),
    "half a pair": Mistake(
        "TMP/p.csv, line 1: a sentence is empty: remove the row",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
        files={"p.csv": b"one,,3\n"},
    ),
    "a demo is there": Mistake(
        "TMP/demo already holds a demo: choose another --output or remove it",
        ("demo", "--output", "TMP/demo"),
        files={"demo/metrics.json": b"{}"},
    ),
    "a run without an encoder": Mistake(
        "TMP/run is a run that has not finished, so it has no encoder: continue it with resume=true",
        ("demo", "--output", "TMP/demo", "--model", "TMP/run"),
        files={"run/recipe.yaml": b"", "run/metrics.jsonl": b""},
    ),
    "demo output is a file": Mistake(
        "--output TMP/texts.txt cannot be written: Not a directory: choose a path that you can write to",
        ("demo", "--output", "TMP/texts.txt", "--model", "MODEL"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])
