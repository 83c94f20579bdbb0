"""Vectors in fewer bytes: what is stored, what is read again, and how well they are searched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import Encoder, load_vectors, vector_blocks
from llm2vec_ds.vectors.quantized import dequantize, hamming, quantize
from llm2vec_ds.vectors.search import search
from tests.support.in_process import assert_reads, error_line, run
from tests.support.tiny import sentences

TEXTS = sentences(200, seed=3)


@pytest.fixture(scope="module")
def exact(tiny_model_dir: Path) -> np.ndarray:
    return Encoder.from_pretrained(tiny_model_dir).encode(TEXTS)


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "in.txt"


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_int8_keeps_directions_and_missing_rows() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32) * 1e-3
    vectors[7] = np.nan
    stored = quantize(vectors, "int8")
    assert (stored.dtype, stored.shape) == (np.int8, (50, 33))
    assert (np.abs(stored).max(axis=1) == 127).sum() == 49
    again = dequantize(stored, "int8", 33)
    assert np.isnan(again[7]).all()
    good = np.arange(50) != 7
    assert cosines(vectors[good], again[good]).min() > 0.9999


def test_binary_keeps_signs_and_counts_those_that_differ() -> None:
    generator = np.random.default_rng(0)
    vectors, query = generator.normal(size=(40, 35)), generator.normal(size=35)
    stored = quantize(vectors, "binary")
    assert (stored.dtype, stored.shape) == (np.uint8, (40, 5))
    np.testing.assert_array_equal(dequantize(stored, "binary", 35), np.where(vectors > 0, 1.0, -1.0))
    expected = ((vectors > 0) != (query > 0)).sum(axis=1)
    np.testing.assert_array_equal(hamming(stored, quantize(query[None], "binary")[0]), expected)


@pytest.mark.parametrize("stored", ["int8", "binary"])
def test_written_in_parts_read_and_searched(
    stored: str,
    input_file: Path,
    tiny_model_dir: Path,
    exact: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm2vec_ds.vectors.files.ROWS_PER_BLOCK", 64)
    monkeypatch.setattr("llm2vec_ds.vectors.search.ROWS_PER_BLOCK", 64)
    arguments = ("encode", "--model", tiny_model_dir, "--input", input_file, "--store", stored, "--output")
    assert run(monkeypatch, *arguments, tmp_path / "v.npy") == 0
    for shard in ("0/2", "1/2"):
        assert run(monkeypatch, *arguments, tmp_path / "parts", "--shard", shard) == 0
    width = {"int8": 32, "binary": 4}[stored]
    assert np.load(tmp_path / "v.npy").nbytes == len(TEXTS) * width
    assert json.loads((tmp_path / "v.npy.json").read_text())["stored"] == stored
    expected = dequantize(quantize(exact, stored), stored, 32)  # type: ignore[arg-type]
    for place in ("v.npy", "parts"):
        found = load_vectors(tmp_path / place)
        assert (found == expected).mean() > 0.999  # packed otherwise, a rounding may differ
        np.testing.assert_array_equal(np.concatenate(list(vector_blocks(tmp_path / place))), found)
    queries = sentences(20, seed=9)
    encoder = Encoder.from_pretrained(tiny_model_dir)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    recall = 0.0
    for query in queries:
        wanted = set(np.argsort(-unit @ encoder.encode(query))[:5].tolist())
        hits = search(tmp_path / "parts", query, top=5)
        assert [hit.text for hit in hits] == [TEXTS[hit.row] for hit in hits]
        assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
        recall += len(wanted & {hit.row for hit in hits}) / 5 / len(queries)
    assert recall > {"int8": 0.95, "binary": 0.4}[stored]


MISTAKES = {
    ("--store", "int4"): "--store 'int4' is unknown: choose float32, int8, binary",
    (
        "--store",
        "int8",
        "--output",
        "TMP/v.jsonl",
    ): "--store int8 is for .npy files, not for .jsonl: use .npy",
    ("--store", "binary", "--bad-texts", "nan"): (
        "--store binary cannot mark a text without vector: use int8, or --bad-texts raise"
    ),
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_cost_one_line(
    arguments: tuple[str, ...],
    input_file: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "v.npy")]
    assert run(monkeypatch, "encode", "--model", tiny_model_dir, "--input", input_file, *given) == 2
    assert_reads(error_line(capsys), MISTAKES[arguments])


def test_what_was_stored_otherwise_is_another_output(
    input_file: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("encode", "--model", tiny_model_dir, "--input", input_file, "--output", tmp_path / "v.npy")
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--store", "int8") == 2
    assert "exists, made with another store: choose another, or give --overwrite" in error_line(capsys)
    (tmp_path / "v.npy.json").write_text((tmp_path / "v.npy.json").read_text().replace('"float32"', '"int8"'))
    assert run(monkeypatch, "search", tmp_path / "v.npy", "a train") == 2
    assert "it does not hold one int8 vector per row" in error_line(capsys)
