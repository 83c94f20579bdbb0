"""The supervised stage on 1, 2 and 4 ranks × ZeRO 0 to 3 × micro-batches × exchange × LoRA or full.

All of them train the same global batch, so losses, gradient norms and weights are those of one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.global_batch import STEPS, Case, outcome, recipe_of, train_cases
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
WORLDS, ZERO_STAGES, MICRO_BATCHES = (1, 2, 4), (0, 1, 2, 3), (1, 2, 5)
EXCHANGES, ADAPTERS = ("gather", "ring"), ("lora", "full")
ALL_CASES: list[Case] = list(itertools.product(WORLDS, ZERO_STAGES, MICRO_BATCHES, EXCHANGES, ADAPTERS))


def pairwise(cases: list[Case]) -> list[Case]:
    """Few of the cases, in which each two settings of two kinds occur together."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def run_cases(
    cases: list[Case], model: Path, pairs: Path, folder: Path
) -> Iterator[tuple[Case, Any, list[int]]]:
    """Each case with its outcome and its ranks' forward passes; one group of processes a world size."""
    for world in WORLDS:
        own = [case for case in cases if case[0] == world]
        recipes = [recipe_of(case, model, pairs, folder / "-".join(map(str, case))) for case in own]
        counts = run_ranks(partial(train_cases, recipes=recipes), world)
        for place, (case, recipe) in enumerate(zip(own, recipes, strict=True)):
            yield case, outcome(recipe), [count[place] for count in counts]


def check_cases(cases: list[Case], model: Path, pairs: Path, folder: Path) -> None:
    """Every case equals the plainest of its kind."""
    plain = {(e, a): (1, 0, 1, e, a) for e in EXCHANGES for a in ADAPTERS}
    expected: dict[Any, Any] = {}
    for case, (rows, weights), counts in run_cases(
        list(dict.fromkeys([*plain.values(), *cases])), model, pairs, folder
    ):
        _, _, micro_batches, exchange, adapter = case
        # Without a cache one pass a step; with it two for each micro-batch.
        assert set(counts) == {STEPS * (1 if micro_batches == 1 else 2 * micro_batches)}, case
        reference_rows, reference_weights = expected.setdefault((exchange, adapter), (rows, weights))
        for row, other in zip(rows, reference_rows, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), case
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), case
            assert (row["n_tokens"], row["accuracy"]) == (other["n_tokens"], other["accuracy"]), case
        assert weights.keys() == reference_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, reference_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
            )
    start = load_file(model / "model.safetensors")
    for (_, adapter), (_, weights) in expected.items():
        moved = max((weights[name] - start[f"model.{name}"]).abs().max() for name in weights)
        assert moved > (1e-2 if adapter == "lora" else 1e-3)


def test_each_two_settings_together(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    cases = pairwise(ALL_CASES)
    assert 12 <= len(cases) <= 24
    check_cases(cases, tiny_model_dir, pairs_file, tmp_path)


@pytest.mark.slow
def test_all_settings(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    check_cases(ALL_CASES, tiny_model_dir, pairs_file, tmp_path)
