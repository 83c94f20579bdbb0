"""Steps of the product: an ordinary run of `llm2vec-ds train`, measured at the boundaries of its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llm2vec_ds.engine.build import build_stage
from llm2vec_ds.engine.run import train
from llm2vec_ds.engine.trainer import Trainer
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from steps.meter import StepMeter

ADAPTER = {"rank": 16, "alpha": 32, "dropout": 0.05}


def recipe_of(stage: str, model: Path, data: Path, folder: Path, values: dict[str, Any]) -> Recipe:
    """Returns a recipe. `values` are sections that replace those that all runs here share."""
    common: dict[str, Any] = {
        "stage": stage,
        "model": {"path": str(model)},
        "data": {"path": str(data), "max_tokens": 512, "prepared_dir": str(folder / "prepared")},
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "checkpoint": {"every_steps": 0},
        "adapter": ADAPTER,
        "optimizer": {"lr": 1e-4, "schedule": "constant"},
    }
    merged = {
        key: {**common[key], **value} if key in common and isinstance(value, dict) else value
        for key, value in values.items()
    }
    return parse_recipe({**common, **merged})


def measured_run(recipe: Recipe, meter: StepMeter) -> dict[str, Any]:
    """Trains as many steps as the meter needs. Returns its figures, the first losses, and tokens a step."""
    recipe = recipe.model_copy(update={"max_steps": meter.n_steps})
    measure: Any = Trainer._measure  # called before the first step and after each step

    def at_boundary(trainer: Trainer, *arguments: Any) -> float | None:
        meter.boundary()
        found: float | None = measure(trainer, *arguments)
        return found

    with patch.object(Trainer, "_measure", at_boundary):
        run = train(recipe)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = meter.figures()
    tokens = rows[-1]["n_tokens"]
    return {
        **figures,
        "tokens": tokens,
        "tokens_per_s": round(tokens / figures["wall_ms"] * 1e3, 1),
        "first_losses": [round(row["loss"], 4) for row in rows[:3]],
    }


def masked_batches(recipe: Recipe, n_steps: int, device: torch.device) -> list[Any]:
    """Returns the packed and masked batches of the first steps of an MNTP run, for the plain loop."""
    stage = build_stage(recipe, device)
    made = []
    for step in range(n_steps):
        (batch,), _ = stage.batches(step, stage.global_batch(step))
        made.append(batch)
    return made
