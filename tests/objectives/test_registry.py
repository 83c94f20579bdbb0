"""An objective that engine and planner have never heard of trains, is planned and goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import EpochBatches
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank
from llm2vec_ds.objectives import registry
from llm2vec_ds.objectives.base import Objective, Parts, StepResult, dropout_seed, equal_count
from llm2vec_ds.recipe.objectives import SECTIONS, ObjectiveConfig
from tests.support.in_process import run
from tests.support.runs import write_recipe


class LengthConfig(ObjectiveConfig):
    """Settings of the toy below."""

    largest_length: int = 64
    """Lengths are divided by it."""


class LengthModel(nn.Module):
    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.encoder, self.section = parts.encoder, cast(LengthConfig, parts.recipe.objective)
        self.linear = nn.Linear(parts.encoder.dimensions, 1)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor]:
        predicted_S = self.linear(self.encoder(batch))[:, 0]
        return ((predicted_S - batch.cu_seqlens.diff() / self.section.largest_length).square(),)


class LengthStage:
    """A text's vector says how long it is."""

    def __init__(self, parts: Parts) -> None:
        self.texts: Any = parts.training
        self.model, self.encoder = LengthModel(parts), parts.encoder
        self.data_fingerprint, batch = self.texts.fingerprint, parts.recipe.batch
        self.global_batch_size, self.seed = batch.global_batch_size, parts.recipe.seed
        self.global_batch = EpochBatches(len(self.texts), batch.global_batch_size, self.seed)
        self.micro_batch_tokens = batch.micro_batch_tokens

    def text(self, row: int) -> TokenizedText:
        return self.texts[[row]][0]

    def batches(self, step: int, rows: np.ndarray) -> list[np.ndarray]:
        return [
            rows[group] for group in plan_micro_batches(self.texts.lengths[rows], self.micro_batch_tokens)
        ]

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        return pack(texts)

    def step(self, step: int, rows: np.ndarray, batches: Any, forward: Any, backward: Any) -> StepResult:
        total, n_passes = torch.zeros(()), equal_count(batches, self.encoder.device)
        for index in range(n_passes):
            torch.manual_seed(dropout_seed(self.seed, step, rank(), index))
            group, weight = (batches[index], 1) if index < len(batches) else (batches[0], 0)
            share = forward(pack(self.texts[group]))[0].sum() * weight / self.global_batch_size
            backward(share, rows=group.tolist(), last=index == n_passes - 1)
            total += share.detach()
        return StepResult(float(all_reduce_sum(total)), int(self.texts.lengths[rows].sum()))

    def held_out(self, forward: Any) -> None:
        return None


class Length(Objective):
    section = LengthConfig

    def build(self, parts: Parts) -> LengthStage:
        return LengthStage(parts)


@pytest.fixture
def recipe_file(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> Any:
    registry.register("length", Length())
    values = {
        "stage": "length",
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": str(texts_file), "max_tokens": 64},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "batch": {"global_batch_size": 16, "micro_batch_tokens": 160, "halve_if_out_of_memory": True},
        "optimizer": {"lr": 1e-2},
        "length": {"largest_length": 64},
    }
    yield write_recipe(values, tmp_path / "length.yaml")
    del SECTIONS["length"], registry.OBJECTIVES["length"]


def test_a_new_objective_trains_and_goes_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe_file.parent / "run"

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert run(monkeypatch, "train", recipe_file, "checkpoint.every_steps=3") == 0
    whole = losses()
    assert whole[-1] < whole[0] / 2
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["length"]["largest_length"] == 64
    (folder / "finished").unlink()
    for file in (folder / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    assert run(monkeypatch, "train", recipe_file, "resume=true", "checkpoint.every_steps=3") == 0
    assert losses() == whole


def test_a_new_objective_is_planned(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", recipe_file, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stage"] == "length"
    assert plan["largest_global_batch"] is None  # it exchanges no vectors


def test_its_mistakes_are_named(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", recipe_file, "length.largest=3") == 2
    assert "`length.largest`: did you mean `length.largest_length`?" in capsys.readouterr().err


def test_sections_and_objectives_belong_together() -> None:
    assert {stage: objective.section for stage, objective in registry.OBJECTIVES.items()} == SECTIONS


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'mntp' already has an objective"):
        registry.register("mntp", Length())
