"""Whole runs: one process equals two ranks under every ZeRO stage; a run folder holds what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2vec_ds.engine.build import build_stage
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import NO_DROPOUT, recipe, trained


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path
) -> dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """Losses and weights of each stage as one plain process."""
    folder = tmp_path_factory.mktemp("one")
    results = {}
    for stage in ("mntp", "simcse"):
        values = recipe(stage, tiny_model_dir, texts_file, folder / stage, **NO_DROPOUT)
        results[stage] = trained(values), load_file(folder / stage / "encoder" / "model.safetensors")
    return results


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_two_ranks_equal_one_process(
    stage: str, zero_stage: int, one_process: Any, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    config = f"ds_configs/zero{zero_stage}.json" if zero_stage else None
    values = recipe(stage, tiny_model_dir, texts_file, tmp_path / "run", deepspeed=config, **NO_DROPOUT)
    rows = trained(values, ranks=2, as_users_do=(stage, zero_stage) == ("simcse", 2))
    expected, expected_weights = one_process[stage]
    assert len(rows) == len(expected) == 6
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["n_tokens"] == other["n_tokens"]
    weights = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    start = load_file(tiny_model_dir / "model.safetensors")
    moved = max((expected_weights[k] - start[f"model.{k}"]).abs().max() for k in expected_weights)
    assert moved > 1e-2
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-5)


def test_micro_batch_size_changes_nothing(
    one_process: Any, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    values["batch"]["micro_batch_tokens"] = 10_000
    losses = [row["loss"] for row in trained(values)]
    assert losses == pytest.approx([row["loss"] for row in one_process["simcse"][0]], rel=1e-5)


def test_a_run_learns_and_leaves_its_folder(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", adapter=None, max_steps=30)
    values["data"]["held_out_path"] = str(texts_file)
    values["held_out_every_steps"] = 10
    values["optimizer"]["lr"] = 5e-3
    rows = trained(values)
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "encoder",
        "finished",
        "held_out.jsonl",
        "memory.json",
        "metrics.jsonl",
        "recipe.yaml",
        "run.json",
    ]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_ms", "data_ms", "peak_mib", "n_tokens"} <= rows[
        0
    ].keys()
    assert rows[0]["lr"] == pytest.approx(2.5e-3)
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held_out] == [0, 10, 20, 30]
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.5
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]
    assert "simcse" not in resolved


@pytest.mark.parametrize("which", ["none", "full"])
def test_activation_checkpointing_changes_no_loss(
    which: str, one_process: Any, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    values["model"]["activation_checkpointing"] = which
    losses = [row["loss"] for row in trained(values)]
    assert losses == pytest.approx([row["loss"] for row in one_process["mntp"][0]], rel=1e-5)


@pytest.mark.parametrize("adapter", [{"rank": 4}, None], ids=["lora", "full"])
def test_what_trains(
    adapter: dict[str, int] | None, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    """With adapters nothing else moves, not even a head of its own; without them everything does."""
    recipe_ = parse_recipe(recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", adapter=adapter))
    stage = build_stage(recipe_, torch.device("cpu"))
    trainable = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    if adapter:
        assert trainable == {name for name in trainable if "lora_" in name}
        assert len(trainable) == 2 * 2 * 7
    else:
        assert trainable == {name for name, _ in stage.model.named_parameters()}
        assert "head.weight" in trainable


def test_same_seed_same_losses_with_dropout(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / name, max_steps=3, seed=seed)
        values["simcse"]["attention_dropout"] = 0.3
        losses.append([row["loss"] for row in trained(values, as_users_do=name != "c")])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adapters_are_one_operation_with_their_layer_under_zero(
    zero_stage: int, tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    config = f"ds_configs/zero{zero_stage}.json"
    trained(
        recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1, deepspeed=config), ranks=2
    )
    said = (tmp_path / "run.log.0").read_text()
    n_adapted = re.search(r"lora rank 16 on (\d+) linear layers", said)
    n_fused = re.search(r"fused with their adapter: (\d+)", said)
    assert n_adapted, said[-2000:]
    assert n_fused
    assert n_fused[1] == n_adapted[1] != "0"
