"""Vectors of files: formats, shards, and what a killed run leaves."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm2vec_ds import Encoder, UserError, load_vectors, vector_blocks
from llm2vec_ds.vectors.encode import EncodeOptions, Target, encode_file
from llm2vec_ds.vectors.files import Shard, read_rows
from llm2vec_ds.vectors.search import search
from tests.support.tiny import sentences

TEXTS = sentences(11)


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> np.ndarray:
    return Encoder.from_pretrained(tiny_model_dir).encode(TEXTS)


@pytest.fixture
def options(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> EncodeOptions:
    monkeypatch.setattr("llm2vec_ds.encoder.replicas.TEXTS_PER_BLOCK", 2)
    monkeypatch.setattr("llm2vec_ds.vectors.files.ROWS_PER_BLOCK", 3)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return EncodeOptions(str(tiny_model_dir), str(tmp_path / "in.txt"))


def encode(
    options: EncodeOptions, output: Path, shard: str | None = None, format: str = "npy", **more: Any
) -> Path:
    return encode_file(options, Target.of(output, shard, f".{format}"), **more)


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_each_format_holds_the_vectors_in_order(
    suffix: str, options: EncodeOptions, tmp_path: Path, expected: np.ndarray
) -> None:
    file = encode(options, tmp_path / f"v{suffix}")
    np.testing.assert_allclose(load_vectors(file), expected, atol=1e-5)
    assert max(len(block) for block in vector_blocks(file)) == 3
    if suffix != ".npy":
        rows = [row for block in read_rows(file) for row in block]
        assert [(row["row"], row["text"]) for row in rows] == list(enumerate(TEXTS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.txt", file.name, f"{file.name}.json"]


def test_the_micro_batch_size_is_no_part_of_what_vectors_are(
    options: EncodeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Following the advice of a full memory keeps finished blocks, finished shards and the index."""
    caplog.set_level("INFO")
    smaller = replace(options, micro_batch_tokens=64)
    with monkeypatch.context() as patch:
        patch.setattr("llm2vec_ds.vectors.encode._Encoding._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(options, tmp_path / "v", "0/2")
    encode(smaller, tmp_path / "v", "0/2")
    assert "continuing what an earlier run began" in caplog.text
    encode(options, tmp_path / "v", "0/2")
    assert "already done, nothing to do" in caplog.text
    encode(smaller, tmp_path / "v", "1/2")
    assert len(load_vectors(tmp_path / "v")) == len(TEXTS)


def test_half_of_a_surrogate_pair_is_a_bad_text(options: EncodeOptions, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "the river"}\n{"text": "cut \\ud83d"}\n{"text": "rain"}\n')
    own = replace(options, input=str(tmp_path / "in.jsonl"))
    with pytest.raises(UserError, match="in.jsonl, row 2 is no text in UTF-8"):
        encode(own, tmp_path / "v.npy")
    vectors = load_vectors(encode(replace(own, bad_texts="nan"), tmp_path / "v.npy"))
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True, False]
    with pytest.raises(UserError, match="text 0 .counted from 0. is not text"):
        Encoder.from_pretrained(options.model).encode(["cut \ud83d"])


@pytest.mark.parametrize("output", ["in.jsonl", "link.jsonl", "shards"])
def test_an_output_that_is_the_input_is_refused(output: str, options: EncodeOptions, tmp_path: Path) -> None:
    """Also by another name, and where a shard would be it."""
    row = '{"text": "the river", "id": 7}\n'
    (tmp_path / "shards").mkdir()
    file = tmp_path / ("shards/shard-00000-of-00001.jsonl" if output == "shards" else "in.jsonl")
    file.write_text(row)
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    own = replace(options, input=str(file))
    with pytest.raises(UserError, match="would overwrite .*, which is an input: choose another output"):
        encode(own, tmp_path / output, format="jsonl", overwrite=True)
    assert file.read_text() == row


def test_standard_input_is_not_written_over(options: EncodeOptions, tmp_path: Path) -> None:
    """`encode --input - --output t.jsonl < t.jsonl`."""
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "the river", "id": 7}\n')
    before, kept = file.read_text(), os.dup(0)
    with file.open() as opened:
        os.dup2(opened.fileno(), 0)
        try:
            with pytest.raises(UserError, match=r"would overwrite .*t\.jsonl, which is an input"):
                encode(replace(options, input="-"), file, overwrite=True)
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    assert file.read_text() == before


def test_a_note_replaces_nothing_of_others(options: EncodeOptions, tmp_path: Path) -> None:
    (tmp_path / "v.npy.json").write_text('{"a thesis": "about vectors"}')
    before = (tmp_path / "v.npy.json").read_text()
    with pytest.raises(UserError, match="its note would overwrite .*npy.json, which is another file"):
        encode(options, tmp_path / "v.npy", overwrite=True)
    assert (tmp_path / "v.npy.json").read_text() == before


@pytest.mark.parametrize("format", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_shards_follow_one_another(
    format: str, count: int, options: EncodeOptions, tmp_path: Path, expected: np.ndarray
) -> None:
    """13 shards of 11 texts: some are empty."""
    for index in reversed(range(count)):
        encode(options, tmp_path / "v", f"{index}/{count}", format)
    np.testing.assert_allclose(load_vectors(tmp_path / "v"), expected, atol=1e-5)


def test_parts_cover_every_row_once() -> None:
    for n_rows, count in [(0, 3), (1, 3), (10, 3), (10, 10), (10**9 + 7, 64)]:
        parts = [Shard(index, count).rows(n_rows) for index in range(count)]
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == n_rows
        sizes = [stop - start for start, stop in parts]
        assert max(sizes) - min(sizes) <= 1


def test_a_finished_shard_is_left_alone(options: EncodeOptions, tmp_path: Path) -> None:
    file = encode(options, tmp_path / "v", "1/3")
    before = file.stat()
    assert encode(options, tmp_path / "v", "1/3") == file
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    other = EncodeOptions(options.model, options.input, normalize=True)
    with pytest.raises(UserError, match="exists, made with another normalize: choose another"):
        encode(other, tmp_path / "v", "1/3")
    with pytest.raises(UserError, match="exists, made with another instruction, normalize: choose another"):
        encode(replace(other, instruction="Find:"), tmp_path / "v", "1/3")
    encode(other, tmp_path / "v", "1/3", overwrite=True)
    np.testing.assert_allclose(np.linalg.norm(np.load(file), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_killed_shard_goes_on_where_it_stopped(
    format: str, options: EncodeOptions, tmp_path: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(options, tmp_path / "v", "0/2", format)
    encoded: list[str] = []
    tokenized = Encoder._tokenized

    def die_later(self: Encoder, texts: list[str], *rest: Any) -> Any:
        if len(encoded) == dies_after:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return tokenized(self, texts, *rest)

    monkeypatch.setattr(Encoder, "_tokenized", die_later)
    dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        encode(options, tmp_path / "v", "1/2", format)
    with pytest.raises(UserError, match=r"shard\(s\) 1 of 2 are missing"):
        load_vectors(tmp_path / "v")
    dies_after = -1
    encode(options, tmp_path / "v", "1/2", format)
    assert encoded == TEXTS[5:]
    np.testing.assert_allclose(load_vectors(tmp_path / "v"), expected, atol=1e-5)
    assert not list((tmp_path / "v").glob(".*"))


def test_bad_texts_keep_their_rows(options: EncodeOptions, tmp_path: Path, expected: np.ndarray) -> None:
    Path(options.input).write_bytes(b"\n".join([TEXTS[0].encode(), b"", b"\xff", TEXTS[3].encode()]))
    options = EncodeOptions(options.model, options.input, bad_texts="nan")
    for suffix in (".npy", ".jsonl", ".parquet"):
        vectors = load_vectors(encode(options, tmp_path / f"v{suffix}"))
        assert np.isnan(vectors).all(axis=1).tolist() == [False, True, True, False]
        np.testing.assert_allclose(vectors[[0, 3]], expected[[0, 3]], atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [TEXTS[0], "", None, TEXTS[3]]
    assert rows[1]["vector"] is None


@pytest.mark.parametrize("format", ["npy", "jsonl"])
def test_search_finds_what_a_full_sort_finds(
    format: str, options: EncodeOptions, tmp_path: Path, expected: np.ndarray
) -> None:
    for index in range(2):
        encode(options, tmp_path / "v", f"{index}/2", format)
    hits = search(tmp_path / "v", TEXTS[7], top=4)
    cosines = expected @ expected[7] / np.linalg.norm(expected, axis=1) / np.linalg.norm(expected[7])
    order = np.argsort(-cosines)[:4]
    assert [hit.row for hit in hits] == order.tolist()
    assert [hit.text for hit in hits] == [TEXTS[i] for i in order]
    np.testing.assert_allclose([hit.cosine for hit in hits], cosines[order], atol=1e-5)


def test_search_passes_over_rows_without_a_vector(options: EncodeOptions, tmp_path: Path) -> None:
    Path(options.input).write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    encode(EncodeOptions(options.model, options.input, bad_texts="nan"), tmp_path / "v.npy")
    assert [hit.row for hit in search(tmp_path / "v.npy", TEXTS[0])] == [0, 2]
    (tmp_path / "v.npy.json").unlink()
    with pytest.raises(UserError, match="has no note"):
        search(tmp_path / "v.npy", TEXTS[0])


def test_search_does_not_show_texts_of_another_input(options: EncodeOptions, tmp_path: Path) -> None:
    file = encode(options, tmp_path / "v.npy")
    old, source = tmp_path / "old.txt", Path(options.input)
    source.rename(old)
    source.write_text("a new first line\n" + old.read_text())
    with pytest.raises(UserError, match="exists, made with another state of the input: choose another"):
        encode(options, file)
    with pytest.raises(UserError, match="has changed since it was encoded, so its rows may be other texts"):
        search(file, TEXTS[7])
    assert search(file, TEXTS[7], top=1, texts=str(old))[0].text == TEXTS[7]
    old.write_text("\n".join(TEXTS[:7]) + "\n")
    with pytest.raises(UserError, match="has no text in row 7, so these are not the texts that were encoded"):
        search(file, TEXTS[7], top=1, texts=str(old))


def test_search_does_not_compare_with_another_encoder(
    options: EncodeOptions, tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "encoder"
    Encoder.from_pretrained(tiny_model_dir).save(model)
    file = encode(replace(options, model=str(model)), tmp_path / "v.npy")
    found = search(file, TEXTS[7], top=1)
    same = tmp_path / "moved"
    model.rename(same)
    assert search(file, TEXTS[7], top=1, model=str(same)) == found
    assert "is not the encoder that made" not in caplog.text
    Encoder.from_pretrained(tiny_model_dir, settings={"pooling": "last"}).save(model)
    with pytest.raises(UserError, match="has changed since it made"):
        search(file, TEXTS[7])
    search(file, TEXTS[7], model=str(model))
    assert "is not the encoder that made" in caplog.text


def test_standard_input_is_a_file_too(
    options: EncodeOptions, tmp_path: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(TEXTS).encode())))
    file = encode(EncodeOptions(options.model, "-"), tmp_path / "v.jsonl")
    np.testing.assert_allclose(load_vectors(file), expected, atol=1e-5)
    assert search(file, TEXTS[2], top=1)[0].text == TEXTS[2]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\n\ntwo\n")))
    with pytest.raises(UserError, match=r"^standard input, line 2: the text is empty: correct"):
        encode(EncodeOptions(options.model, "-"), tmp_path / "w.jsonl")


def test_shards_of_different_encodings_are_not_joined(options: EncodeOptions, tmp_path: Path) -> None:
    encode(options, tmp_path / "v", "0/2")
    encode(EncodeOptions(options.model, options.input, normalize=True), tmp_path / "v", "1/2")
    with pytest.raises(UserError, match="different models, inputs or options"):
        load_vectors(tmp_path / "v")
    encode(options, tmp_path / "v", "0/3")
    with pytest.raises(UserError, match="several encodings"):
        load_vectors(tmp_path / "v")
    with pytest.raises(UserError, match="holds no vectors"):
        load_vectors(tmp_path / "nothing")
