"""Damaged vectors, notes, work folders and results of runs: named in one line, never used."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_ds import UserError, load_vectors
from llm2vec_ds.engine.metrics import MetricsLog
from llm2vec_ds.export.card import origin
from llm2vec_ds.mining.corpus import load_corpus, write_corpus
from llm2vec_ds.mining.mine import mine
from llm2vec_ds.mining.options import MiningOptions
from llm2vec_ds.report.data import read_folders
from llm2vec_ds.vectors.encode import EncodeOptions, Target, encode_file
from llm2vec_ds.vectors.search import search
from tests.support.damage import DEEP, JSON_DAMAGE, changed, damage
from tests.support.tiny import sentences


def encoded(model: Path, texts: Path, file: Path) -> Path:
    return encode_file(EncodeOptions(str(model), str(texts)), Target.of(file, None, ".npy"))


@pytest.fixture(scope="module")
def whole_vectors(tiny_model_dir: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for suffix in (".npy", ".jsonl", ".parquet"):
        encoded(tiny_model_dir, texts_file, folder / f"v{suffix}")
    return folder


@pytest.fixture
def vectors(whole_vectors: Path, tmp_path: Path) -> Path:
    """Files of vectors in each format, undamaged."""
    return Path(shutil.copytree(whole_vectors, tmp_path / "vectors"))


def other_array(array: np.ndarray) -> Callable[[Path], None]:
    return lambda file: np.save(file, array)


VECTOR_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "npy, cut off": ("v.npy", lambda file: damage(file, JSON_DAMAGE["cut off"])),
    "npy, empty": ("v.npy", lambda file: damage(file, JSON_DAMAGE["empty"])),
    "npy, random bytes": ("v.npy", lambda file: damage(file, JSON_DAMAGE["random bytes"])),
    "npy, another type": ("v.npy", other_array(np.zeros((64, 32)))),
    "npy, one dimension": ("v.npy", other_array(np.zeros(64, dtype=np.float32))),
    "npy, other vectors": ("v.npy", other_array(np.zeros((64, 31), dtype=np.float32))),
    "npy, fewer rows": ("v.npy", other_array(np.zeros((63, 32), dtype=np.float32))),
    "jsonl, cut off": ("v.jsonl", lambda file: damage(file, lambda content: content[:-99])),
    "jsonl, fewer rows": ("v.jsonl", lambda file: damage(file, lambda c: b"".join(c.splitlines(True)[:-1]))),
    "jsonl, a row without vector": ("v.jsonl", lambda file: damage(file, lambda c: c + b'{"row": 1}\n')),
    "jsonl, another length": ("v.jsonl", lambda file: damage(file, lambda c: c.replace(b"[", b"[0.5, ", 1))),
    "jsonl, nested": ("v.jsonl", lambda file: damage(file, lambda content: DEEP + b"\n" + content)),
    "parquet, cut off": ("v.parquet", lambda file: damage(file, JSON_DAMAGE["cut off"])),
    "parquet, other columns": ("v.parquet", lambda file: pq.write_table(pa.table({"row": [1, 2]}), file)),
}


@pytest.mark.parametrize("how", VECTOR_DAMAGE)
def test_damaged_vectors_are_named(how: str, vectors: Path) -> None:
    name, do = VECTOR_DAMAGE[how]
    assert load_vectors(vectors / name).shape == (64, 32)
    do(vectors / name)
    message = rf"{re.escape(str(vectors / name))} is damaged \(.+\): encode the texts again, with --overwrite"
    with pytest.raises(UserError, match=message):
        load_vectors(vectors / name)


@pytest.mark.parametrize("how", [*JSON_DAMAGE, "another type"])
def test_a_damaged_note_of_vectors_is_named(how: str, vectors: Path) -> None:
    damage(vectors / "v.npy.json", {**JSON_DAMAGE, "another type": changed(dimensions="many")}[how])
    with pytest.raises(UserError, match=r"v\.npy\.json is damaged \(.+\): encode the texts again"):
        search(vectors / "v.npy", "trout")


@pytest.mark.parametrize("how", ["progress.json", "vectors.npy"])
def test_encoding_does_not_go_on_from_damage(
    how: str, tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "v.npy"
    with monkeypatch.context() as patch:
        patch.setattr("llm2vec_ds.vectors.encode._Encoding._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoded(tiny_model_dir, texts_file, output)
    folder = tmp_path / ".v.npy.encoding"
    damage(folder / how, JSON_DAMAGE["cut off"] if how == "vectors.npy" else JSON_DAMAGE["a list"])
    with pytest.raises(UserError, match=rf"{how} is damaged"):
        encoded(tiny_model_dir, texts_file, output)
    shutil.rmtree(folder)
    assert load_vectors(encoded(tiny_model_dir, texts_file, output)).shape == (64, 32)


@pytest.mark.parametrize(
    "how", ["progress.json", "documents.arrow", "index.npz", "documents.npy", "found.jsonl"]
)
def test_mining_does_not_go_on_from_damage(
    how: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(20)
    rows = [{"query": q, "positive": p} for q, p in zip(texts[:10], texts[10:], strict=True)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = MiningOptions(model=str(tiny_model_dir), pairs=str(tmp_path / "p.jsonl"), negatives=1)
    with monkeypatch.context() as patch:
        patch.setattr("llm2vec_ds.mining.mine._Mining.counts", lambda *_: 1 / 0)
        patch.setattr("llm2vec_ds.mining.mine.shutil.rmtree", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine(options, tmp_path / "m.jsonl")
    folder = tmp_path / ".m.jsonl.mining"
    if how == "found.jsonl":
        (tmp_path / "m.jsonl").rename(folder / how)
    else:
        (tmp_path / "m.jsonl").unlink()
    damage(folder / how, JSON_DAMAGE["cut off"])
    with pytest.raises(UserError, match=r"damaged \(.+\): remove .+ to start again"):
        mine(options, tmp_path / "m.jsonl")


def test_texts_to_mine_that_end_between_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Arrow stream that is cut there reads like a shorter one."""
    monkeypatch.setattr("llm2vec_ds.mining.corpus.TEXTS_PER_BLOCK", 5)
    texts = sentences(20)
    write_corpus(tmp_path, zip(texts[:10], texts[10:], strict=True), None, Counter())
    assert len(load_corpus(tmp_path).documents) == 10
    short = pa.ipc.open_stream((tmp_path / "documents.arrow").read_bytes()).read_next_batch()
    with (
        pa.OSFile(str(tmp_path / "documents.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, short.schema) as to,
    ):
        to.write_batch(short)
    with pytest.raises(UserError, match=r"documents\.arrow is cut off"):
        load_corpus(tmp_path)


def test_lines_of_a_run_that_are_no_rows_end_what_is_kept(tmp_path: Path) -> None:
    good = '{"step": 1}\n'
    for line in ("[1]", '{"loss": 1}', DEEP.decode(), '{"step": "x"}'):
        (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n{good}")
        MetricsLog(tmp_path, 3, "simcse", first_step=2).close()
        assert (tmp_path / "metrics.jsonl").read_text() == good


RESULTS = ("results.json", "metrics.json", "scores.json")


@pytest.mark.parametrize("how", JSON_DAMAGE)
@pytest.mark.parametrize("name", RESULTS)
def test_damaged_results_of_a_report_are_named(name: str, how: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    damage(tmp_path / name, JSON_DAMAGE[how])
    with pytest.raises(
        UserError, match=rf"{name} is damaged \(.+\): make it again, or leave this folder out"
    ):
        read_folders([tmp_path])


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1.0}', '{"step": 1, "loss": "low"}', "{", DEEP.decode()])
def test_damaged_rows_of_a_report_are_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 .+: remove the line, or leave"):
        read_folders([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st')
    assert len(read_folders([tmp_path]).runs[0].steps) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("recipe.yaml", b"stage: [mntp"), ("recipe.yaml", b"- 1\n"), ("metrics.json", b"[1]")],
)
def test_what_a_card_is_made_of_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged \(.+\): export the encoder folder from another"):
        origin(tmp_path)
