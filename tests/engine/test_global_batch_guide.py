"""A guide, and a source without in-batch negatives, on 1, 2 and 4 ranks × ZeRO 0 to 3 × micro-batches.

Texts of the same side are negatives as well.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.global_batch import EXAMPLES, STEPS, TEXTS_AN_EXAMPLE, outcome, train_cases
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT
from tests.support.teachers import save_teacher

Case = tuple[int, int, int, str, str]
"""World size, ZeRO stage, micro-batches a rank at least, exchange, what trains."""

CASES: list[Case] = [
    (1, 0, 1, "gather", "lora"),
    (1, 0, 1, "ring", "full"),
    (1, 3, 5, "gather", "lora"),
    (1, 1, 2, "ring", "full"),
    (2, 2, 2, "gather", "lora"),
    (2, 3, 1, "ring", "full"),
    (4, 1, 1, "gather", "lora"),
    (4, 3, 2, "gather", "lora"),
    (4, 2, 2, "ring", "full"),
]


def recipe_of(case: Case, folder: Path, model: Path, output: Path) -> dict[str, Any]:
    world, zero_stage, micro_batches, exchange, trains = case
    texts = -(-EXAMPLES * TEXTS_AN_EXAMPLE // world)
    own = {"symmetric": True, "guide_margin": 0.05} if exchange == "ring" else {"guide_ratio": 0.9}
    own |= {"between_queries": True, "between_documents": True}
    return {
        "stage": "supervised",
        "model": {"path": str(model)},
        "data": {
            "path": str(folder / "pairs"),
            "max_tokens": 16,
            "pairs": {"instructions": str(folder / "instructions.yaml")},
            "prepared_dir": str(folder / "prepared"),
        },
        "output_dir": str(output),
        "max_steps": STEPS,
        "deepspeed": str(ROOT / "ds_configs" / f"zero{zero_stage}.json") if zero_stage else None,
        "batch": {"global_batch_size": EXAMPLES, "micro_batch_tokens": 9 * -(-texts // micro_batches)},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "adapter": NO_DROPOUT["adapter"] if trains == "lora" else None,
        "supervised": {"scale": 5.0, "exchange": exchange, "guide": str(folder / "guide" / "teacher"), **own},
    }


@pytest.mark.slow
def test_all_train_the_same(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    (tmp_path / "pairs").mkdir()
    rows = pairs_file.read_text().splitlines(keepends=True)
    for name, own in (("labels", rows[:12]), ("web", rows[12:])):
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(own))
    (tmp_path / "instructions.yaml").write_text(
        "labels: {group: all, in_batch_negatives: false}\nweb: {group: all}\n"
    )
    save_teacher(tmp_path / "guide")
    recipes = {case: recipe_of(case, tmp_path, tiny_model_dir, tmp_path / f"{case}") for case in CASES}
    for world in (1, 2, 4):
        own_recipes = [recipes[case] for case in CASES if case[0] == world]
        run_ranks(partial(train_cases, recipes=own_recipes), world)
    expected: dict[str, Any] = {}
    for case in CASES:
        found, weights = outcome(recipes[case])
        reference, reference_weights = expected.setdefault(case[3], (found, weights))
        counted = [key for key in reference[0] if "/" in key]
        assert {"guided_out/web", "negatives/labels"} <= set(counted)
        for row, other in zip(found, reference, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), case
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), case
            assert [row[key] for key in counted] == [other[key] for key in counted], case
            assert row["guided_out/web"] > 0
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, reference_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
            )
