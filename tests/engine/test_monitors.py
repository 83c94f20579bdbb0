"""Metrics go where the recipe's `monitor` says, with the values and steps of metrics.jsonl."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm2vec_ds.engine.run_stages import train_stages
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import cut_off, recipe, trained


def curve(path: Path) -> list[tuple[int, float]]:
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header[0] == "step"
    return [(int(step), float(value)) for step, value in rows]


def test_csv_files_hold_every_step_of_this_run(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    stale = tmp_path / "run" / "monitor" / "csv" / "train_loss.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("step,loss\n1,99\n")  # of the run that is overwritten
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", monitor=["csv"], overwrite=True)
    values["data"]["held_out_path"] = str(texts_file)
    rows = trained(values | {"max_steps": 3})
    folder = tmp_path / "run" / "monitor" / "csv"
    for name in ("loss", "accuracy", "lr", "grad_norm", "n_tokens"):
        assert curve(folder / f"train_{name}.csv") == [
            (row["step"], pytest.approx(row[name])) for row in rows
        ]
    measured = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured] == [0, 3]
    expected = [(row["step"], pytest.approx(row["loss"])) for row in measured]
    assert curve(folder / "held_out_loss.csv") == expected


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_reads_the_same(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = recipe(
        "mntp", tiny_model_dir, texts_file, tmp_path / "run", monitor=["tensorboard"], max_steps=2
    )
    rows = trained(values)
    events = EventAccumulator(str(tmp_path / "run" / "monitor" / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


class StandInForWandb(ModuleType):
    """Writes down what it is told; as wandb, it does not begin a second run before the first has ended."""

    VARIABLES = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR")

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, str]] = []
        self.logged: list[int] = []
        self.ended: list[int] = []

    def init(self, **given: Any) -> None:
        assert len(self.begun) == len(self.ended)
        self.begun.append({**given, **{name: os.environ[name] for name in self.VARIABLES}})

    def log(self, values: dict[str, float], step: int, commit: Any) -> None:
        if "train/loss" in values:
            self.logged.append(step)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandInForWandb:
    found, module = importlib.util.find_spec, StandInForWandb()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb" or found(name))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_a_run_that_goes_on_goes_on_in_its_run_of_wandb(
    wandb: StandInForWandb,
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    values = recipe("mntp", tiny_model_dir, texts_file, whole, monitor="wandb", checkpoint={"every_steps": 3})
    before = dict(os.environ)
    train_stages([parse_recipe(values)])
    resumed = cut_off(values, killed)
    (killed / "monitor").mkdir()
    (killed / "monitor" / "wandb_run_id").write_text((whole / "monitor" / "wandb_run_id").read_text())
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train_stages([parse_recipe(resumed)])
    monkeypatch.delenv("WANDB_PROJECT")
    train_stages([parse_recipe({**values, "overwrite": True, "max_steps": 2})])
    first, second, third = wandb.begun
    assert wandb.logged == [1, 2, 3, 4, 5, 6, 4, 5, 6, 1, 2]
    assert wandb.ended == [0, 0, 0]
    assert (first["project"], second["project"], first["group"]) == ("llm2vec-ds", "mine", "whole")
    assert (first["WANDB_NAME"], first["WANDB_RESUME"]) == ("whole", "allow")
    assert first["WANDB_RUN_ID"] == second["WANDB_RUN_ID"] != third["WANDB_RUN_ID"]
    assert {name: value for name, value in os.environ.items() if name.startswith("WANDB")} == {
        name: value for name, value in before.items() if name.startswith("WANDB")
    }


def test_a_stage_in_the_same_process_has_a_run_of_its_own_and_the_users_variables_stand(
    wandb: StandInForWandb,
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_NAME", "my name")
    recipes = [
        parse_recipe(
            recipe(stage, tiny_model_dir, texts_file, tmp_path / stage, monitor=["wandb"], max_steps=2)
        )
        for stage in ("mntp", "simcse")
    ]
    train_stages(recipes)
    assert [begun["WANDB_NAME"] for begun in wandb.begun] == ["my name"] * 2
    assert len({begun["WANDB_RUN_ID"] for begun in wandb.begun}) == 2
    assert os.environ["WANDB_NAME"] == "my name"
