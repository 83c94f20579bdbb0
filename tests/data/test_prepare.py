"""Sources of every format → the same prepared rows, once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from llm2vec_ds.config import DataConfig
from llm2vec_ds.data.prepare import load_prepared, prepare
from llm2vec_ds.errors import UserError
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["the river runs", 'an old mill, quoted "so"', "bread is baked on sundays"]


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[column], *([text] for text in texts)])
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({column: texts}), path)
    return path


def prepared(path: Path | list[str], **config: object):
    where = path if isinstance(path, list) else str(path)
    data = DataConfig(path=where, **config)  # type: ignore[arg-type]
    return load_prepared(prepare(data, data.path, TOKENIZER))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    texts = prepared(write(tmp_path / f"a{suffix}", TEXTS))
    assert len(texts) == 3
    decoded = [TOKENIZER.decode(text.input_ids, skip_special_tokens=True) for text in texts[[0, 1, 2]]]
    assert decoded == TEXTS
    assert [len(text) for text in texts[[0, 1, 2]]] == texts.lengths.tolist()


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    one = prepared(write(tmp_path / "a.txt", TEXTS)).fingerprint
    assert prepared(write(tmp_path / "b.jsonl", TEXTS)).fingerprint == one
    assert prepared(write(tmp_path / "c.txt", TEXTS[:2])).fingerprint != one


def test_second_time_reads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", TEXTS)
    prepared(path)
    monkeypatch.setattr(
        "llm2vec_ds.data.prepare.stream_texts", lambda *_: pytest.fail("read the source again")
    )
    prepared(path)


def test_a_stopped_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object):
        yield "the river"
        raise KeyboardInterrupt

    path = write(tmp_path / "a.txt", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr("llm2vec_ds.data.prepare.stream_texts", broken)
        with pytest.raises(KeyboardInterrupt):
            prepared(path, prepared_dir=str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    assert len(prepared(path, prepared_dir=str(tmp_path / "out"))) == 3


def test_blank_lines_are_left_out_and_long_texts_cut_or_split(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.txt", ["", "  ", "the river runs past an old mill where children fish", "bread"]
    )
    assert prepared(path, max_tokens=5).lengths.tolist()[0] == 5
    assert len(prepared(path, max_tokens=5)) == 2
    blocks = prepared(path, max_tokens=5, long_texts="split")
    assert len(blocks) > 2
    assert blocks.lengths.max() == 5


@pytest.mark.parametrize(
    ("name", "texts", "config", "message"),
    [
        ("a.txt", ["", " "], {}, "no text in it"),
        ("a.jsonl", TEXTS, {"text_column": "body"}, "no column 'body'; set data.text_column to one of: text"),
    ],
)
def test_unusable_sources(
    tmp_path: Path, name: str, texts: list[str], config: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(write(tmp_path / name, texts), **config)


def test_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        prepared(tmp_path / "none.txt")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match="unknown format '.docx'"):
        prepared(tmp_path / "a.docx")
    write(tmp_path / "a.txt", TEXTS)
    write(tmp_path / "a.csv", TEXTS)
    with pytest.raises(UserError, match="several formats"):
        prepared([str(tmp_path / "a.txt"), str(tmp_path / "a.csv")])
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait\n" * 3)
    with pytest.raises(UserError, match="not readable as text"):
        prepared(tmp_path / "b.txt")
