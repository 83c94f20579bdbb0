"""Each file of ds_configs/ trains on two ranks as one process does, LoRA and full."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.engine.deepspeed_engine import deepspeed_config
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.global_batch import outcome, recipe_of, train_cases
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT

ADAPTERS = ("lora", "full")


def trained(
    name: str | None,
    adapters: tuple[str, ...],
    model: Path,
    pairs: Path,
    folder: Path,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Metrics and weights by adapter, in two micro-batches on two ranks; on one process without a name."""
    world, recipes = (2 if name else 1), {}
    for adapter in adapters:
        recipe = recipe_of((world, 0, 2, "gather", adapter), model, pairs, folder / f"{name}-{adapter}")
        recipe["deepspeed"] = str(ROOT / "ds_configs" / f"{name}.json") if name else None
        recipe["model"]["precision"] = precision
        recipes[adapter] = recipe
    run_ranks(partial(train_cases, recipes=list(recipes.values())), world)
    return {adapter: outcome(recipe) for adapter, recipe in recipes.items()}


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pairs_file: Path
) -> dict[str, Any]:
    return trained(None, ADAPTERS, tiny_model_dir, pairs_file, tmp_path_factory.mktemp("one"))


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for adapter, (rows, weights) in found.items():
        other_rows, other_weights = expected[adapter]
        for row, other in zip(rows, other_rows, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert weights.keys() == other_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, other_weights[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hpz_trains(
    adapter: str, one_process: Any, tmp_path: Path, tiny_model_dir: Path, pairs_file: Path
) -> None:
    """In processes of its own: DeepSpeed makes hpZ's groups once. Both ranks are one group here."""
    check_equal(trained("zero3_hpz", (adapter,), tiny_model_dir, pairs_file, tmp_path), one_process)


def test_bf16_in_parts_equals_bf16_whole(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    """Loaded in parts or whole, trunk and adapters become bf16 with an fp32 copy in the optimizer."""
    whole = trained("zero2", ADAPTERS, tiny_model_dir, pairs_file, tmp_path, "bf16")
    parts = trained("zero3", ADAPTERS, tiny_model_dir, pairs_file, tmp_path, "bf16")
    for adapter, (rows, weights) in parts.items():
        other_rows, other_weights = whole[adapter]
        assert rows[0]["loss"] == pytest.approx(other_rows[0]["loss"], rel=1e-5)
        losses, other_losses = ([row["loss"] for row in found] for found in (rows, other_rows))
        assert losses == pytest.approx(other_losses, rel=1e-2)
        assert {w.dtype for w in weights.values()} == {w.dtype for w in other_weights.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offload_trains(
    name: str, one_process: Any, tmp_path: Path, tiny_model_dir: Path, pairs_file: Path
) -> None:
    """Slow because DeepSpeed compiles its Adam for the host the first time (g++, about a minute)."""
    check_equal(trained(name, ADAPTERS, tiny_model_dir, pairs_file, tmp_path), one_process)


@pytest.mark.parametrize(("name", "torch_adam"), [("zero3", True), ("zero2_offload", False)])
def test_the_host_has_its_own_adam(name: str, torch_adam: bool, tmp_path: Path) -> None:
    values = {"stage": "mntp", "model": {"path": "m"}, "data": {"path": "t.txt"}, "output_dir": "o"}
    recipe = parse_recipe({**values, "deepspeed": str(ROOT / "ds_configs" / f"{name}.json")})
    config = deepspeed_config(recipe, 2, torch.float32)
    assert config["optimizer"]["params"]["torch_adam"] is torch_adam


def test_hpz_groups_must_fill_the_world() -> None:
    values = {"stage": "mntp", "model": {"path": "m"}, "data": {"path": "t.txt"}, "output_dir": "o"}
    recipe = parse_recipe({**values, "deepspeed": str(ROOT / "ds_configs" / "zero3_hpz.json")})
    assert deepspeed_config(recipe, 16, torch.float32)["zero_optimization"]["zero_hpz_partition_size"] == 8
    with pytest.raises(UserError, match="zero_hpz_partition_size 8 does not divide 12 ranks"):
        deepspeed_config(recipe, 12, torch.float32)
