"""A run's folder stands for its encoder wherever a model is named, once it has finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import encoder_of, with_encoders_of_runs
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.in_process import error_line, run
from tests.support.runs import recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(parse_recipe(recipe("mntp", tiny_model_dir, texts_file, folder, max_steps=1)))


def test_a_run_is_its_encoder(finished: Path) -> None:
    expected = Encoder.from_pretrained(finished / "encoder").encode(["a trout"])
    np.testing.assert_array_equal(Encoder.from_pretrained(finished).encode(["a trout"]), expected)


def test_all_else_is_itself(finished: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    for place in (finished / "encoder", tiny_model_dir, tmp_path, tmp_path / "none", Path("owner/name")):
        assert encoder_of(str(place)) == str(place)


def test_a_run_without_its_encoder_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "runs" / "a")
    with pytest.raises(UserError, match=r"runs holds several runs: choose one of .*runs/a"):
        encoder_of(str(copy.parent))
    (copy / "finished").unlink()  # of an earlier run, then
    with pytest.raises(UserError, match="which has not finished: continue that run with resume=true"):
        encoder_of(str(copy))
    shutil.rmtree(copy / "encoder")
    with pytest.raises(UserError, match="is a run that has not finished, so it has no encoder: continue"):
        encoder_of(str(copy))


def test_the_next_stage_starts_from_a_run(finished: Path, texts_file: Path, tmp_path: Path) -> None:
    """Also where it is the teacher; and its folder is not written over."""
    values: dict[str, Any] = recipe("simcse", finished, texts_file, tmp_path / "next", max_steps=1)
    written = load_recipe(train(parse_recipe(values)) / "recipe.yaml")
    assert written.model.path == str(finished / "encoder")
    del values["simcse"]
    taught = parse_recipe({**values, "stage": "distil", "distil": {"teacher": str(finished)}})
    assert with_encoders_of_runs(taught).objective.teacher == str(finished / "encoder")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"holds model\.path"):
        train(parse_recipe({**values, "stage": "mntp", "output_dir": str(finished), "overwrite": True}))


def test_commands_take_a_run_and_an_index_is_found_from_everywhere(
    finished: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named relative to the folder of then."""
    copy = shutil.copytree(finished, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(texts_file.read_text().splitlines()[:5]) + "\n")
    files = ["--input", "a.txt", "--output", tmp_path / "v.npy"]
    assert run(monkeypatch, "encode", "--model", "runs/mine", *files) == 0
    note = json.loads((tmp_path / "v.npy.json").read_text())
    assert note["model"] == str(copy / "encoder")
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert run(monkeypatch, "search", tmp_path / "v.npy", "a trout", "--top", "1") == 0
    found = capsys.readouterr().out
    assert run(monkeypatch, "search", tmp_path / "v.npy", "a trout", "--top", "1", "--model", copy) == 0
    assert capsys.readouterr().out == found
    assert run(monkeypatch, "encode", "--model", copy.parent, *files) == 2
    assert error_line(capsys) == f"{copy.parent} holds several runs: choose one of {copy}"
    shutil.rmtree(copy)
    assert run(monkeypatch, "search", tmp_path / "v.npy", "a trout") == 2
    gone = f"was made by {copy / 'encoder'}, which is gone: give its encoder with --model"
    assert error_line(capsys).endswith(gone)
