"""Distillation on 1, 2 and 4 ranks × ZeRO 0 to 3 × micro-batches × losses × LoRA or full."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.global_batch import STEPS, outcome, train_cases
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT
from tests.support.teachers import save_teacher

TEXTS = 20
LOSSES: dict[str, dict[str, Any]] = {
    "kl": {"temperature": 0.2, "vector_weight": 1.0, "simcse_weight": 0.5},
    "mse": {
        "vector_loss": "mse",
        "similarity_loss": "mse",
        "projection": "none",
        "vector_weight": 1.0,
        "similarity_weight": 3.0,
    },
}
Case = tuple[int, int, int, str, str]
"""World size, ZeRO stage, micro-batches a rank at least, losses, what trains."""

CASES: list[Case] = [
    (1, 0, 1, "kl", "lora"),
    (1, 0, 1, "mse", "full"),
    (1, 3, 5, "kl", "lora"),
    (1, 1, 2, "mse", "full"),
    (2, 2, 2, "kl", "lora"),
    (2, 3, 1, "mse", "full"),
    (2, 0, 5, "mse", "full"),
    (4, 1, 1, "kl", "lora"),
    (4, 3, 2, "kl", "lora"),
    (4, 2, 2, "mse", "full"),
]


def recipe_of(case: Case, model: Path, texts: Path, teacher: Path, output: Path) -> dict[str, Any]:
    world, zero_stage, micro_batches, losses, trains = case
    return {
        "stage": "distil",
        "model": {"path": str(model)},
        "data": {"path": str(texts), "max_tokens": 16, "prepared_dir": str(output.parent / "prepared")},
        "output_dir": str(output),
        "max_steps": STEPS,
        "deepspeed": str(ROOT / "ds_configs" / f"zero{zero_stage}.json") if zero_stage else None,
        "batch": {
            "global_batch_size": TEXTS,
            "micro_batch_tokens": 16 * max(1, -(-TEXTS // world) // micro_batches),
        },
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "adapter": NO_DROPOUT["adapter"] if trains == "lora" else None,
        "distil": {"teacher": str(teacher), **LOSSES[losses]},
    }


@pytest.mark.slow
@pytest.mark.parametrize("largest_world", [2, 4])
def test_all_train_the_same(
    largest_world: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    teacher = save_teacher(tmp_path / "t")
    cases = [case for case in CASES if case[0] <= largest_world]
    recipes = {
        case: recipe_of(case, tiny_model_dir, texts_file, teacher, tmp_path / f"{case}") for case in cases
    }
    for world in (1, 2, 4)[: largest_world.bit_length()]:
        own = [recipes[case] for case in cases if case[0] == world]
        run_ranks(partial(train_cases, recipes=own), world)
    expected: dict[str, Any] = {}
    for case in cases:
        rows, weights = outcome(recipes[case])
        reference_rows, reference_weights = expected.setdefault(case[3], (rows, weights))
        for row, other in zip(rows, reference_rows, strict=True):
            for name in ("loss", "grad_norm", *(key for key in row if key.endswith("_loss"))):
                assert row[name] == pytest.approx(other[name], rel=1e-4), (case, name)
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, reference_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
            )
    (first, *_, last) = expected["kl"][0]
    assert first["simcse_loss"] > 0
    assert last["loss"] < first["loss"]
