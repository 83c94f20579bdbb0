"""Files of rows as people have them: endings, delimiters, byte order marks, rows that do not fit."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from pathlib import Path

import pytest

from llm2vec_ds.data.row_files import BadRows, rows_of
from llm2vec_ds.data.sources import find_source, stream_texts
from llm2vec_ds.data.text_rows import TextRows
from llm2vec_ds.errors import UserError

TEXTS = ["the river", 'grüne Hügel, "sagt" er', "rain"]
CONTENTS = {
    ".txt": "\n".join(TEXTS) + "\n",
    ".jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
    ".csv": 'text\nthe river\n"grüne Hügel, ""sagt"" er"\nrain\n',
    ".tsv": 'text\tid\nthe river\t1\ngrüne Hügel, "sagt" er\t2\n"rain"\t3\n',
}


def texts(path: Path, bad_rows: str = "raise") -> list[str]:
    return list(stream_texts(find_source(str(path)), "text", Counter(), whole=True, bad_rows=bad_rows))


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings_and_endings(encoding: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix.upper()}"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    path.write_bytes(mark + CONTENTS[suffix].replace("\n", "\r\n").encode(encoding))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_is_found_and_said(
    delimiter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f'id{delimiter}text\n1{delimiter}one, two\n2{delimiter}"a{delimiter}b"\n')
    with caplog.at_level("INFO"):
        assert texts(path) == ["one, two", f"a{delimiter}b"]
    assert f"{path}: fields are separated by {delimiter!r}" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "mistake"),
    [
        ("a.csv", "text\nplain\nhello, my name is Ann\nrain\n", "line 3: 2 fields, but the header has 1"),
        ("a.csv", "text,b\nplain,1\n1\nrain,1\n", "line 3: 1 field, but the header has 2: is the row cut"),
        ("a.csv", 'text\nplain\n"x" y\nrain\n', "after line 3: not a row of CSV"),
        ("a.csv", "text\nplain\na\0b\nrain\n", "line 3: it contains a NUL byte"),
        ("a.tsv", "text\tb\nplain\t1\na\tb\tc\nrain\t2\n", "line 3: 3 fields, but the header has 2"),
        (
            "a.jsonl",
            '{"text": "plain"}\n[1]\n{"text": "rain"}\n',
            "line 2: expected one JSON object per line",
        ),
        (
            "a.jsonl",
            '{"text": "plain"}\n{"text": ["a"]}\n{"text": "rain"}\n',
            "line 2: column 'text' holds a list",
        ),
        (
            "a.json",
            '[{"text": "plain"}, {"text": true}, {"text": "rain"}]',
            "item 2: column 'text' holds true",
        ),
    ],
)
def test_a_bad_row_is_named_or_left_out(name: str, content: str, mistake: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=mistake):
        texts(tmp_path / name)
    assert texts(tmp_path / name, "skip") == ["plain", "rain"]
    rows = TextRows(find_source(str(tmp_path / name)), "text", 0, 3, bad_rows="skip")
    assert list(rows) == ["plain", None, "rain"]


@pytest.mark.parametrize("bad_rows", ["raise", "skip"])
def test_a_quote_that_is_not_closed_is_refused(bad_rows: str, tmp_path: Path) -> None:
    """It holds all the rows after it."""
    (tmp_path / "a.csv").write_text('text\n"never closed\nrain\n')
    with pytest.raises(UserError, match="a quote is not closed"):
        texts(tmp_path / "a.csv", bad_rows)


def test_missing_values_are_no_words(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": NaN}\n{"text": ""}\n')
    (tmp_path / "a.csv").write_text('text,b\n,1\n"",2\n')
    assert texts(tmp_path / "a.jsonl") == ["", "", ""]
    assert texts(tmp_path / "a.csv") == ["", ""]


def test_a_file_in_two_encodings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nrain\n\xff\n")
    with pytest.raises(UserError, match="a.csv is not text in UTF-8"):
        texts(tmp_path / "a.csv")


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links are followed, once; hidden files are not read; what is left out is said."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "sub", data / ".ipynb_checkpoints", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"{folder.name}\n")
    (data / ".hidden.txt").write_text("hidden\n")
    (data / "notes.pdf").write_text("no text\n")
    (data / "linked").symlink_to(elsewhere)
    (data / "sub" / "up").symlink_to(data)
    with caplog.at_level("INFO"):
        assert texts(data) == ["elsewhere", "sub"]
    assert "4 left out: " in caplog.text
    for name in (".ipynb_checkpoints/", ".hidden.txt", "notes.pdf", "sub/up/ (already read)"):
        assert str(data / name) in caplog.text


def test_any_name_of_a_file(tmp_path: Path) -> None:
    for name in ("a::b.txt", "a*[1].txt", "http:c.txt"):
        (tmp_path / name).write_text("rain\n")
        assert texts(tmp_path / name) == ["rain"]


def test_rows_have_places(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nrain\n')
    places = [place for _, place in rows_of(tmp_path / "a.csv", ["text"], BadRows())]
    assert places == [f"{tmp_path}/a.csv, line 3", f"{tmp_path}/a.csv, line 4"]
