"""Sources of every format → the same prepared rows, once."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.data import prepare as prepare_module
from llm2vec_ds.data.prepare import load_prepared, prepare
from llm2vec_ds.data.prompts import tokenize
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import DataConfig
from tests.support.tiny import sentences, tiny_tokenizer

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
        "llm2vec_ds.data.prepare.stream_texts", lambda *_, **__: pytest.fail("read the source again")
    )
    prepared(path)


def test_a_killed_preparation_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llm2vec_ds")
    monkeypatch.setattr(prepare_module, "TEXTS_PER_PART", 10)
    monkeypatch.setattr(prepare_module, "TEXTS_PER_BLOCK", 5)
    lines = sentences(50)
    lines[7:7] = ["", lines[0]]
    path = write(tmp_path / "a.txt", lines)
    whole = prepared(path, prepared_dir=str(tmp_path / "whole"))

    calls = []

    def killed(*arguments: object, **options: object):
        calls.append(1)
        if len(calls) == 6:  # in the middle of the third part
            raise KeyboardInterrupt
        return tokenize(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(path, prepared_dir=str(tmp_path / "out"))
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    resumed = prepared(path, prepared_dir=str(tmp_path / "out"))
    assert "continuing after 20 texts" in caplog.text
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.counts == whole.counts
    assert len(resumed) == 51
    assert (resumed.counts["blank"], resumed.counts["duplicates"]) == (1, 1)
    assert len(whole.rows.data.column("n_tokens").chunks) > 1


def test_bad_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    good = "the river runs"
    lines = [
        b"\xef\xbb\xbf" + good.encode(),
        b"",
        b"  \t",
        b"binary\0data",
        b"caf\xe9 latin-1",
        "bread é".encode(),
    ]
    (tmp_path / "a.txt").write_bytes(b"\r\n".join([*lines, good.encode()]))
    texts = prepared(tmp_path / "a.txt")
    assert len(texts) == 3
    assert texts.counts | {"tokens": 0} == {
        "rows": 3, "tokens": 0, "blank": 2, "binary": 1, "not UTF-8": 1, "duplicates": 1, "shortened": 0
    }  # fmt: skip
    assert TOKENIZER.decode(texts[[0]][0].input_ids, skip_special_tokens=True) == good


def test_rows_that_an_earlier_run_left_out_are_not_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the river"}\n{"text": \n{"text": "bread"}\n')
    assert len(prepared(file, bad_rows="skip")) == 2
    with pytest.raises(UserError, match="1 row.s. that cannot be read, which an earlier run left out"):
        prepared(file)
    assert len(prepared(file, bad_rows="skip")) == 2


@pytest.mark.parametrize("long_texts", ["truncate", "split"])
def test_an_enormous_line_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_texts: str
) -> None:
    monkeypatch.setattr("llm2vec_ds.data.row_files.LONGEST_LINE_BYTES", 2000)
    monkeypatch.setattr("llm2vec_ds.data.sources.LONGEST_TEXT_CHARACTERS", 500)
    words = [f"w{i}" for i in range(2000)]
    texts = prepared(
        write(tmp_path / "a.txt", [" ".join(words), "bread"]), max_tokens=64, long_texts=long_texts
    )
    body = " ".join(TOKENIZER.decode(t.input_ids, skip_special_tokens=True) for t in texts[range(len(texts))])
    assert texts.counts["oversized"] >= 1
    if long_texts == "split":
        assert body.replace(" ", "") == "".join(words) + "bread"
    assert texts.lengths.max() == 64


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files_and_folders(tmp_path: Path, suffix: str, opener: Callable[..., Any]) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    with opener(tmp_path / "in" / "deeper" / f"b.txt{suffix}", "wt") as file:
        file.write("\n".join(TEXTS[2:]))
    write(tmp_path / "in" / "a.txt", TEXTS[:2])
    (tmp_path / "in" / "notes.md").write_text("not data")
    assert prepared(tmp_path / "in").fingerprint == prepared(write(tmp_path / "c.txt", TEXTS)).fingerprint


def test_end_of_sequence_and_template_are_part_of_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXTS)
    data = DataConfig(path=str(path), template="Text: {text}!", max_tokens=12)
    texts = load_prepared(prepare(data, data.path, TOKENIZER, end_with_eos=True))
    for row in texts[[0, 1, 2]]:
        assert row.input_ids[-1] == TOKENIZER.eos_token_id
        whole = TOKENIZER.decode(row.input_ids)
        assert whole.startswith("<s>Text: ")
        assert whole.endswith("!</s>")
        assert len(row) <= 12


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
        (
            "a.jsonl",
            TEXTS,
            {"text_column": "body"},
            "line 1: no column 'body': set data.text_column to one of",
        ),
        ("a.csv", TEXTS, {"text_column": "body"}, "line 2: no column 'body'"),
        ("a.parquet", TEXTS, {"text_column": "body"}, "no column 'body'"),
    ],
)
def test_unusable_sources(
    tmp_path: Path, name: str, texts: list[str], config: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(write(tmp_path / name, texts), **config)


def test_texts_in_another_encoding_are_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"the river\ncaf\xe9\n")
    prepare(DataConfig(path="a"), str(tmp_path / "a.txt"), tiny_tokenizer())
    assert "1 texts are not UTF-8 and are left out. Convert the file, such as by iconv" in caplog.text


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
    with pytest.raises(UserError, match=r"no text in it \(3 not UTF-8\)"):
        prepared(tmp_path / "b.txt")
    for name, content, message in (
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2: not valid JSON"),
        ("b.jsonl", b'["one"]\n', "expected one JSON object per line"),
        ("c.csv", b"text\ncaf\xe9\n", "not text in UTF-8"),
        ("d.parquet", b"PAR1 nothing", "not a Parquet file"),
        ("e.txt.gz", b"not gzip", "cannot be read"),
        ("f.txt", "the river".encode("utf-16")[:-1], "its byte order mark names this encoding"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            prepared(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_hub_data_set_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        UserError, match="hub data set hub:some/set@test cannot be read .*check its name, the split"
    ):
        prepared(["hub:some/set@test"])


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*arguments: object, **options: object) -> Any:
        asked.append((arguments, options))
        return iter({"body": text} for text in TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(prepared(["hub:some/set:part@test"], text_column="body")) == 3
    assert asked == [(("some/set", "part"), {"split": "test", "streaming": True})]


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Peak of what Python holds while a source, and one six times as long, are prepared."""

    def peak_bytes(n_texts: int) -> int:
        lines = [f"{i} " + "the river runs past an old mill " * 12 for i in range(n_texts)]
        path = write(tmp_path / f"{n_texts}.txt", lines)
        del lines
        data = DataConfig(path=str(path))
        tracemalloc.start()
        prepare(data, data.path, TOKENIZER)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(500)  # imports and caches
    assert peak_bytes(6000) < 1.3 * peak_bytes(1000)
