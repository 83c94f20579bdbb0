"""What a user of `encode` gets wrong, and of `search`, which reads its vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.in_process import assert_reads, error_line, full_disk, run
from tests.support.mistakes import FREE_SOME, PAIRS, Mistake


def encode(*more: str, input: str = "texts.txt", output: str = "v.npy") -> tuple[str, ...]:
    return ("encode", "--model", "MODEL", "--input", f"TMP/{input}", "--output", f"TMP/{output}", *more)


MISTAKES = {
    "no input": Mistake("data file TMP/none not found (relative paths start at …)", encode(input="none")),
    "a data set of the hub without hub:": Mistake(
        "data file owner/name@test not found (…): for a data set of the hub write hub:owner/name@test",
        ("encode", "--model", "MODEL", "--input", "owner/name@test", "--output", "TMP/v.npy"),
    ),
    "empty input": Mistake("--input TMP/a.txt is empty: give …", encode(input="a.txt"), files={"a.txt": b""}),
    "binary input": Mistake(
        "TMP/a.txt, row 2 is no text in UTF-8: convert the file, such as by iconv …",
        encode(input="a.txt"),
        files={"a.txt": b"one\n\xff\0\n"},
    ),
    "input of an unknown format": Mistake(
        "data file TMP/a.doc: unknown format '.doc': use one of .txt, …",
        encode(input="a.doc"),
        files={"a.doc": b"one"},
    ),
    "no such column to encode": Mistake(
        "TMP/p.jsonl, line 1: no column 'text': set --text-column to one of query, positive",
        encode(input="p.jsonl"),
        files=PAIRS,
    ),
    "blank line": Mistake(
        "TMP/a.txt, line 2: the text is empty: correct or remove it, or give --bad-texts nan",
        encode(input="a.txt"),
        files={"a.txt": b"one\n\ntwo\n"},
    ),
    "a pipe": Mistake(
        "data file /dev/null is a pipe or a device: write it to a file first. `encode` reads …",
        ("encode", "--model", "MODEL", "--input", "/dev/null", "--output", "TMP/v.npy"),
    ),
    "to standard output": Mistake(
        "--output - is no file: vectors cannot go to standard output",
        ("encode", "--model", "MODEL", "--input", "TMP/a.txt", "--output", "-"),
        files={"a.txt": b"one\n"},
    ),
    "a blank in a column's name": Mistake(
        "TMP/a.csv, line 2: no column 'text': set --text-column to one of id, ' text'",
        encode(input="a.csv"),
        files={"a.csv": b"id, text\n1,one\n"},
    ),
    "blank cell": Mistake(
        "TMP/a.csv, line 4: the text is empty: correct or remove it, or give --bad-texts nan",
        encode(input="a.csv"),
        files={"a.csv": b'text,n\n"one\nmore",1\n,2\n'},
    ),
    "a column twice": Mistake(
        "TMP/a.csv has the column 'text' twice: rename one of them",
        encode(input="a.csv"),
        files={"a.csv": b"text,text\nfirst,second\n"},
    ),
    "unknown kind of bad texts": Mistake(
        "--bad-texts 'skip' is unknown: choose raise or nan", encode("--bad-texts", "skip")
    ),
    "not .npy": Mistake(
        "--output TMP/v.txt must end in .npy, .jsonl, .parquet, or name a folder", encode(output="v.txt")
    ),
    "unknown format of shards": Mistake(
        "--format 'csv' is unknown: choose one of npy, jsonl, parquet", encode("--format", "csv", output="v")
    ),
    "output is there": Mistake(
        "--output TMP/v.npy exists: choose another, or give --overwrite", encode(), files={"v.npy": b"x"}
    ),
    "not a shard": Mistake(
        "--shard '4/4' must be I/N with 0 ≤ I < N, such as 0/16", encode("--shard", "4/4", output="v")
    ),
    "shard of a file": Mistake(
        "--shard needs a folder, but --output TMP/v.npy is a file: leave out .npy", encode("--shard", "0/4")
    ),
    "shard of standard input": Mistake(
        "--shard needs a file as --input: standard input is read once",
        ("encode", "--model", "MODEL", "--input", "-", "--output", "TMP/v", "--shard", "0/2"),
    ),
    "unknown prompt": Mistake(
        "prompt_name 'query' is unknown; this encoder's prompts: none", encode("--prompt-name", "query")
    ),
    "too many dimensions": Mistake(
        "truncate_dim=33: vectors have 32 dimensions", encode("--truncate-dim", "33")
    ),
    "output below a file": Mistake(
        "--output TMP/texts.txt/v.npy cannot be written: …: choose a path that you can write to",
        encode(output="texts.txt/v.npy"),
    ),
    "unknown attention": Mistake("unknown attention backend 'eager': …", encode("--attention", "eager")),
    "unknown precision": Mistake(
        "precision 'fp8' is unknown: choose auto, fp32 or bf16", encode("--precision", "fp8")
    ),
    "nothing to search for": Mistake(
        "the query is empty: give the text to search for", ("search", "TMP/none", " ")
    ),
    "nothing to search": Mistake(
        "TMP/none holds no vectors: write some with llm2vec-ds encode", ("search", "TMP/none", "trout")
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])


def test_a_full_disk_for_vectors(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "v.npy"
    output.write_bytes(b"precious")
    files = ["--input", texts_file, "--output", output, "--overwrite"]
    with full_disk(4000):
        assert run(monkeypatch, "encode", "--model", tiny_model_dir, *files) == 2
    assert_reads(error_line(capsys), f"--output {output} {FREE_SOME}")
    assert output.read_bytes() == b"precious"
    assert run(monkeypatch, "encode", "--model", tiny_model_dir, *files) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "v.npy.json"]
