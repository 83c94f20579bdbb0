"""What a user of `prepare` gets wrong in data, template and place."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import assert_reads, error_line, full_disk, run
from tests.support.mistakes import FREE_SOME, Mistake
from tests.support.runs import recipe, write_recipe


def data(name: str, **more: Any) -> dict[str, Any]:
    return {"data": {"path": f"TMP/{name}", "max_tokens": 64} | more}


PREPARE = ("prepare", "RECIPE")

MISTAKES = {
    "no data file": Mistake(
        "data file TMP/none.txt not found (relative paths start at ROOT)", PREPARE, data("none.txt")
    ),
    "empty folder": Mistake(
        "data.path 'TMP/empty' names no file of a known format (.txt, .jsonl, .json, .csv, .tsv, .parquet)",
        PREPARE,
        data("empty"),
        files={"empty/notes.md": b"x"},
    ),
    "unknown format": Mistake(
        "data file TMP/a.docx: unknown format '.docx': use one of .txt, .jsonl, .json, .csv, .tsv, .parquet, "
        "plain or with .gz, .bz2, .xz",
        PREPARE,
        data("a.docx"),
        files={"a.docx": b"x"},
    ),
    "wrong column": Mistake(
        "TMP/a.jsonl, line 1: no column 'text': set data.text_column to one of title, body",
        PREPARE,
        data("a.jsonl"),
        files={"a.jsonl": b'{"title": "a", "body": "b"}\n'},
    ),
    "broken JSON": Mistake(
        "TMP/a.jsonl, line 2: not valid JSON: …",
        PREPARE,
        data("a.jsonl"),
        files={"a.jsonl": b'{"text": "one"}\n{"text": \n'},
    ),
    "broken CSV": Mistake(
        "TMP/a.csv is not text in UTF-8 (…): convert it, such as by iconv -f latin1 -t utf8 FILE > NEW",
        PREPARE,
        data("a.csv"),
        files={"a.csv": b"text\ncaf\xe9\n"},
    ),
    "broken Parquet": Mistake(
        "TMP/a.parquet is not a Parquet file: …", PREPARE, data("a.parquet"), files={"a.parquet": b"PAR1 no"}
    ),
    "cut gzip": Mistake(
        "TMP/a.txt.gz cannot be read: Compressed file ended before the end-of-stream marker was reached",
        PREPARE,
        data("a.txt.gz"),
        files={"a.txt.gz": gzip.compress(b"the river runs\n" * 999)[:40]},
    ),
    "not xz": Mistake(
        "TMP/a.txt.xz cannot be read: …", PREPARE, data("a.txt.xz"), files={"a.txt.xz": b"plain text"}
    ),
    "half of UTF-16": Mistake(
        "TMP/a.txt is not text in UTF-16-LE (…): its byte order mark names this encoding: …",
        PREPARE,
        data("a.txt"),
        files={"a.txt": "the river".encode("utf-16")[:-1]},
    ),
    "no text": Mistake(
        "TMP/a.txt: no text in it (2 blank, 1 binary)",
        PREPARE,
        data("a.txt"),
        files={"a.txt": b"\n  \nPK\0\n"},
    ),
    "two formats": Mistake(
        "data files have several formats (.csv, .txt): use one format",
        PREPARE,
        data("both"),
        files={"both/a.txt": b"a\n", "both/b.csv": b"text\nb\n"},
    ),
    "hub data without network": Mistake(
        "hub data set hub:owner/name cannot be read (…): check its name, the split and the network",
        PREPARE,
        {"data": {"path": "hub:owner/name"}},
    ),
    "template without text": Mistake(
        "data.template 'Query: ' must hold {text} once and {instruction} at most once",
        PREPARE,
        data("texts.txt", template="Query: "),
    ),
    "no chat template": Mistake(
        "data.template is `chat`, but the tokenizer has no chat template: write out a form",
        PREPARE,
        data("texts.txt", template="chat"),
    ),
    "long instruction": Mistake(
        "instruction and special tokens take 9 of max_tokens=9: raise max_tokens, or shorten the instruction",
        PREPARE,
        data("texts.txt", max_tokens=9, instruction="the river runs past an old mill"),
    ),
    "prepared_dir below a file": Mistake(
        "prepared texts in TMP/texts.txt/p cannot be written: Not a directory: choose a path that you can "
        "write to",
        PREPARE,
        data("texts.txt", prepared_dir="TMP/texts.txt/p"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])


def test_a_full_disk_while_preparing(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    path = write_recipe(values, tmp_path / "r.yaml")
    where = f"data.prepared_dir={tmp_path / 'p'}"
    with full_disk(4000):
        assert run(monkeypatch, "prepare", path, where) == 2
    assert_reads(error_line(capsys), f"prepared texts in {tmp_path / 'p'} {FREE_SOME}")
    assert not list((tmp_path / "p").glob("[!.]*"))
    assert run(monkeypatch, "prepare", path, where) == 0
    assert "64 rows" in capsys.readouterr().out
