"""What version 1 of each format holds is read as it was written (fixtures/version_1, made by its make.py)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from llm2vec_ds import Encoder, load_vectors
from llm2vec_ds.data.sources import Source
from tests.support.in_process import run

WRITTEN = Path(__file__).parent / "fixtures" / "version_1"
TIME_S = 1_700_000_000
NO_EVALUATION = "evaluation=null"
"""make.py stopped its runs by one."""
STAGES = ("mntp", "simcse", "supervised")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the working folder, with the paths and times that keys were made of."""

    def identity(source: Source) -> list[Any]:
        return [source.hub, *([file.name, file.stat().st_size, TIME_S * 10**9] for file in source.files)]

    folder = tmp_path / "copy"
    shutil.copytree(WRITTEN, folder)
    for path in (folder / "finished" / "encoder").iterdir():
        os.utime(path, (TIME_S, TIME_S))
    monkeypatch.setattr(Source, "identity", identity)
    monkeypatch.chdir(folder)
    return folder


def test_an_encoder_has_the_same_weights_and_vectors(copy: Path) -> None:
    encoder = Encoder.from_pretrained("finished/encoder")
    weights, expected = encoder.trunk.state_dict(), load_file("expected_encoder.safetensors")
    assert all((weights[name] == value).all() for name, value in expected.items())
    vectors = encoder.encode(Path("texts.txt").read_text().splitlines(), normalize=True)
    np.testing.assert_allclose(vectors, np.load("expected_vectors.npy"), atol=1e-6)


def test_vectors_are_read_and_left_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_vectors("vectors").copy()
    np.testing.assert_allclose(before, np.load("expected_vectors.npy"), atol=1e-6)
    options = ["--normalize", "--micro-batch-tokens", 512, "--shard", "0/2"]
    output = ["--input", "texts.txt", "--output", "vectors", *options]
    with caplog.at_level("INFO"):
        assert run(monkeypatch, "encode", "--model", "finished/encoder", *output) == 0
    assert "already done" in caplog.text
    for file in Path("vectors").glob("shard-00001*"):
        file.unlink()
    output[-1] = "1/2"
    assert run(monkeypatch, "encode", "--model", "finished/encoder", *map(str, output)) == 0
    np.testing.assert_allclose(load_vectors("vectors"), before, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on(copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    prepared = sorted(path.name for path in Path("prepared").iterdir())
    output = f"stopped_{stage}"
    changes = ["resume=force", NO_EVALUATION, "adapter.dropout=0"]  # how it is drawn is no part of a format
    assert run(monkeypatch, "train", f"{output}/recipe.yaml", *changes) == 0
    rows = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    expected = json.loads(Path("expected_rows.json").read_text())[stage]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {name: rows[-1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in Path("prepared").iterdir() if path.is_dir()) == prepared


def test_a_stopped_run_is_known(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout its next losses are other draws."""
    assert run(monkeypatch, "train", "stopped_mntp/recipe.yaml", "resume=true", NO_EVALUATION) == 0
    assert Path("stopped_mntp", "metrics.jsonl").read_text().count("\n") == 4


def test_a_finished_run_is_known(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert run(monkeypatch, "train", "finished/recipe.yaml", "resume=true", NO_EVALUATION) == 0
    assert "finished already" in caplog.text
