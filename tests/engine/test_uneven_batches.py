"""Batches that ranks cannot share evenly give the losses and weights of one process.

21 examples over 2 or 4 ranks, 0 to 3 hard negatives each, texts of 3 to 20 words: ranks differ in examples,
texts, tokens and micro-batches.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.data.batches import rank_slice
from llm2vec_ds.engine.build import build_stage
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.global_batch import Case, outcome, recipe_of, train_cases
from tests.support.ranks import run_ranks
from tests.support.tiny import sentences

EXAMPLES, STEPS, TOKENS_PER_MICRO_BATCH = 21, 3, 260
CASES: list[Case] = [
    (2, 0, 0, "gather", "lora"),
    (2, 3, 0, "ring", "full"),
    (4, 0, 0, "ring", "lora"),
    (4, 3, 0, "gather", "full"),
    (4, 3, 0, "ring", "lora"),
]
"""World size, ZeRO stage, (micro-batches come from the token budget), exchange, what trains."""


@pytest.fixture(scope="module")
def uneven_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three batches of examples; the first of each four has no negative, the last has three."""
    texts = iter(sentences(5 * 3 * EXAMPLES, seed=1))
    rows = []
    for number in range(3 * EXAMPLES):
        negatives = [next(texts) for _ in range(number % 4)]
        rows.append({"query": next(texts), "positive": next(texts), "negative": negatives})
    path = tmp_path_factory.mktemp("uneven") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def uneven_recipe(case: Case, model: Path, pairs: Path, output: Path) -> dict[str, Any]:
    recipe = recipe_of((*case[:2], 1, *case[3:]), model, pairs, output)
    recipe["data"]["max_tokens"] = 64
    recipe["data"]["pairs"] = {"max_negatives": 3}
    recipe["max_steps"] = STEPS
    recipe["batch"] = {
        "global_batch_size": EXAMPLES,
        "micro_batch_tokens": TOKENS_PER_MICRO_BATCH,
    }
    return recipe


def shares(recipe: dict[str, Any], world: int) -> list[list[tuple[int, int]]]:
    """Texts and micro-batches of each rank, step by step."""
    stage: Any = build_stage(parse_recipe({**recipe, "deepspeed": None}), torch.device("cpu"))
    found = []
    for step in range(STEPS):
        parts = [rank_slice(stage.global_batch(step), rank, world) for rank in range(world)]
        packed = [stage.batches(0, rows) for rows in parts]
        found.append([(len(own.ids), len(own.groups)) for own in packed])
    return found


def test_uneven_ranks_equal_one_process(tmp_path: Path, tiny_model_dir: Path, uneven_file: Path) -> None:
    plain: list[Case] = list(dict.fromkeys((1, 0, 0, *case[3:]) for case in CASES))
    found = {}
    for world in (1, 2, 4):
        cases = [case for case in [*plain, *CASES] if case[0] == world]
        recipes = [
            uneven_recipe(case, tiny_model_dir, uneven_file, tmp_path / "-".join(map(str, case)))
            for case in cases
        ]
        counts = run_ranks(partial(train_cases, recipes=recipes), world)
        assert all(count == counts[0] for count in counts)  # forward passes, the same on every rank
        found |= {case: outcome(recipe) for case, recipe in zip(cases, recipes, strict=True)}
        if world > 1:
            steps = shares(recipes[0], world)
            assert all(len({n_texts for n_texts, _ in ranks}) > 1 for ranks in steps)
            assert any(len({n_groups for _, n_groups in ranks}) > 1 for ranks in steps)  # one repeats a pass
            assert all(max(n_groups for _, n_groups in ranks) > 1 for ranks in steps)  # with a cache
    for case in CASES:
        (rows, weights), (other_rows, other_weights) = found[case], found[(1, 0, 0, *case[3:])]
        for row, other in zip(rows, other_rows, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), case
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), case
            assert (row["n_tokens"], row["accuracy"]) == (other["n_tokens"], other["accuracy"]), case
        assert weights.keys() == other_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, other_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
            )
