"""No code of a checkpoint runs unless a recipe asks for it: every command, on checkpoints that hold some."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoConfig, AutoTokenizer

from llm2vec_ds.cli.app import app
from llm2vec_ds.encoder.encoder import Encoder
from tests.support.forked import own_environment
from tests.support.in_process import error_line, run
from tests.support.model_commands import CASES, Case
from tests.support.planted import PLANTS, Plant
from tests.support.runs import ROOT, recipe, write_recipe

WITHOUT_A_MODEL = {"doctor", "init"}
"""It trains a model that it builds itself."""


def commands(group: Any, above: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}"


def test_every_command_has_a_case() -> None:
    assert set(commands(typer.main.get_command(app))) == CASES.keys() | WITHOUT_A_MODEL


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    (tmp_path / "marks").mkdir()
    return Plant(tmp_path / "models", tmp_path / "marks")


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("command", CASES)
def test_no_command_runs_it_or_asks_whether_to(
    command: str,
    name: str,
    plant: Plant,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a demo trains is left out: `train` has its own case."""
    monkeypatch.setattr("llm2vec_ds.process.child_command.run_command", lambda *_: 1)
    monkeypatch.chdir(tmp_path)  # some outputs have a place of their own
    case = Case(PLANTS[name](plant), tiny_model_dir, tmp_path)
    for line in CASES[command](case):
        answers = io.StringIO("yes\n" * 9)
        monkeypatch.setattr("sys.stdin", answers)
        code = run(monkeypatch, *line)
        assert not list(plant.marks.iterdir()), line
        assert answers.tell() == 0, line
        if code == 0:
            assert "Traceback" not in capsys.readouterr().err
        else:
            assert code == 2
            error_line(capsys)


def test_the_code_would_run(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the test above would say nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(AttributeError, match="no attribute 'Config'"):
        AutoConfig.from_pretrained(plant.unknown_type(), trust_remote_code=True)
    with pytest.raises(AttributeError, match="no attribute 'Tokenizer'"):
        AutoTokenizer.from_pretrained(plant.unknown_tokenizer(), trust_remote_code=True)
    for file in (
        plant.pickled_weights() / "pytorch_model.bin",
        plant.pickled_parts() / "pytorch_model-00001-of-00001.bin",
        plant.pickled_adapter() / "adapter_model.bin",
    ):
        torch.load(file, weights_only=False)
    ran = {mark.name for mark in plant.marks.iterdir()}
    assert ran == {"own", "own_tokenizer", "weights", "parts", "adapter"}


def test_what_is_written_names_no_code(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plant.known_type()
    Encoder.from_pretrained(model).save(tmp_path / "encoder")
    assert run(monkeypatch, "export", model, "--output", tmp_path / "exported") == 0, capsys.readouterr().err
    written = [file for name in ("encoder", "exported") for file in (tmp_path / name).rglob("*.json")]
    assert len(written) > 5
    assert not [file for file in written if "auto_map" in file.read_text()]


@pytest.mark.slow
def test_a_recipe_that_trusts_a_model_runs_its_code(plant: Plant, texts_file: Path, tmp_path: Path) -> None:
    """In a process of its own: transformers keeps what the code tells it."""
    values = recipe("mntp", plant.working_code(), texts_file, tmp_path / "run", max_steps=1)
    path, trust = str(write_recipe(values, tmp_path / "r.yaml")), "model.trust_remote_code=true"
    lines = [["plan", path], *([name, path, trust] for name in ("plan", "prepare", "train"))]
    code = (
        "import sys; from tests.support.forked import exit_code_of;"
        f"codes = [exit_code_of(line) for line in {lines!r}]; print('exit codes:', codes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=own_environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        timeout=200,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["exit codes: [2, 0, 0, 0]"], done.stderr[-3000:]
    assert (plant.marks / "own").is_dir()
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
