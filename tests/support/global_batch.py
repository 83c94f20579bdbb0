"""Supervised runs that train one global batch, on any number of ranks and in any number of micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llm2vec_ds.engine import deepspeed_engine
from llm2vec_ds.engine.run import train
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import ROOT

EXAMPLES, TEXTS_AN_EXAMPLE, STEPS = 20, 3, 3


Case = tuple[int, int, int, str, str]
"""World size, ZeRO stage, micro-batches a rank, exchange of the loss, what trains."""


def recipe_of(case: Case, model: Path, pairs: Path, output: Path) -> dict[str, Any]:
    world, zero_stage, micro_batches, exchange, adapter = case
    texts = -(-EXAMPLES * TEXTS_AN_EXAMPLE // world)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "zero_init": False}
    return {
        "stage": "supervised",
        "model": {"path": str(model)},
        "data": {"path": str(pairs), "max_tokens": 16},
        "output_dir": str(output),
        "max_steps": STEPS,
        "deepspeed": str(ROOT / "ds_configs" / f"zero{zero_stage}.json") if zero_stage else None,
        "batch": {
            "global_batch_size": EXAMPLES,
            "micro_batch_tokens": 9 * -(-texts // micro_batches),
        },
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "adapter": lora if adapter == "lora" else None,
        "supervised": {"scale": 5.0, "exchange": exchange, "symmetric": exchange == "ring"},
    }


def train_cases(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[int]:
    """Forward passes of this rank in each run."""
    counts = []
    forward = deepspeed_engine.Engine.forward
    for values in recipes:
        calls: list[int] = []

        def counted(self: Any, *inputs: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return forward(self, *inputs)

        deepspeed_engine.Engine.forward = counted  # type: ignore[method-assign]
        train(parse_recipe(values))
        counts.append(len(calls))
    deepspeed_engine.Engine.forward = forward  # type: ignore[method-assign]
    return counts


def outcome(recipe: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    folder = Path(recipe["output_dir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "encoder" / "model.safetensors")
