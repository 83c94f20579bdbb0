"""Planned weights, adapters, gradients and optimizer equal the tensors of real runs, byte for byte."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.distributed import ranks_from_environment
from llm2vec_ds.engine.build import build_stage
from llm2vec_ds.engine.deepspeed_engine import deepspeed_config, partition_for, start_process_group
from llm2vec_ds.model.loading import TrunkOptions
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import MachineConfig
from tests.support.measure import MeasuringEngine, weight_bytes
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, recipe

CASES = [
    ("mntp", 0, "fp32", {}),
    ("mntp", 0, "bf16", {}),
    ("simcse", 1, "fp32", {}),
    ("mntp", 2, "fp32", {}),
    ("simcse", 2, "bf16", {}),
    ("mntp", 2, "fp32", {"adapter": None}),
    ("simcse", 3, "fp32", {}),
    ("mntp", 0, "fp32", {"quantization": "nf4"}),
    ("mntp", 2, "bf16", {"quantization": "nf4"}),
    (
        "mntp",
        2,
        "fp32",
        {"adapter": {"rank": 4, "variant": "dora", "target_modules": ["q_proj", "down_proj"]}},
    ),
]


def _backward(engine: MeasuringEngine, share: torch.Tensor, *, rows: Any, last: bool) -> None:
    engine.backward(share, last=last)


def _measure(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, int]]:
    results = []
    for values in recipes:
        resolved = parse_recipe(values)
        device = start_process_group(ranks_from_environment())
        dtype = TrunkOptions(precision=resolved.model.precision, device=device).dtype
        config = deepspeed_config(resolved, world, dtype)
        stage = build_stage(resolved, device, partition_for(config))
        engine = MeasuringEngine(stage.model, config)
        rows = stage.global_batch(0)[rank::world]
        engine.train()
        stage.step(0, rows, stage.batches(0, rows), engine.forward, partial(_backward, engine))
        engine.step(1e-3)
        weights = engine.parts() if engine.zero_stage == 3 else weight_bytes(stage.model)
        results.append(weights | {"gradients": engine.gradient_bytes, "optimizer": engine.optimizer_bytes})
    return results


def recipe_of(
    case: tuple[str, int, str, dict[str, Any]], model: Path, texts: Path, run: Path
) -> dict[str, Any]:
    stage, zero_stage, precision, changes = case
    config = str(ROOT / "ds_configs" / f"zero{zero_stage}.json") if zero_stage else None
    others = {key: value for key, value in changes.items() if key != "quantization"}
    values = recipe(stage, model, texts, run, deepspeed=config, **{"adapter": {"rank": 4}, **others})
    values["model"] |= {"precision": precision, "quantization": changes.get("quantization")}
    return values


@pytest.mark.parametrize("world", [1, 2])
def test_states_equal_measured_tensors(
    world: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    recipes = [recipe_of(c, tiny_model_dir, texts_file, tmp_path / f"{i}") for i, c in enumerate(CASES)]
    measured = run_ranks(partial(_measure, recipes=recipes), world)
    machine = MachineConfig(nodes=world, gpus_per_node=0, memory_gib=1)
    for index, values in enumerate(recipes):
        resolved = parse_recipe(values)
        planned = Planner(resolved, machine=machine).states(resolved.deepspeed)
        for rank in range(world):
            found = measured[rank][index]
            expected = {name: getattr(planned, name) for name in found}
            assert found == expected, (CASES[index], rank)


def test_real_model_is_counted_to_the_byte(tmp_path: Path) -> None:
    """SmolLM2-135M: tied head, 30 layers; weights and adapters, on the meta device against built ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm2vec_ds.model.adapters import add_lora
    from llm2vec_ds.recipe.files import load_recipe

    path = ROOT / "recipes" / "smollm2_135m" / "mntp.yaml"
    resolved = load_recipe(path)
    planned = Planner(resolved, path, MachineConfig(gpus_per_node=0, memory_gib=8)).states(None)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent), dtype=torch.float32)
    model.requires_grad_(False)
    assert resolved.adapter is not None
    add_lora(model.base_model, resolved.adapter)
    measured = weight_bytes(model)
    assert measured == {"frozen": planned.frozen, "trainable": planned.trainable}
    assert planned.gradients == planned.trainable
    assert planned.optimizer == 2 * planned.trainable
