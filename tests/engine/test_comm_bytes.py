"""Bytes counted in a step equal the formulas of docs/scaling.md."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.engine.comm_bytes import MESSAGES, SILENT, CountedBackend
from llm2vec_ds.engine.run import train
from llm2vec_ds.planner.traffic import step_bytes
from llm2vec_ds.planner.workload import workload
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.global_batch import EXAMPLES, TEXTS_AN_EXAMPLE, recipe_of
from tests.support.ranks import run_ranks

WORLD, WIDTH, FP32_BYTES, ID_BYTES = 2, 32, 4, 8
LORA_PARAMETERS = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)  # two layers, rank 4: q, o; k, v; gate, up, down
EMBEDDING = 400 * 32
TRUNK_PARAMETERS = 31_392
SCALARS = 100
"""Room for the numbers that ranks agree on: counts, losses, norms."""

CASES: list[tuple[int, int, str]] = [
    (0, 1, "gather"),
    (0, 2, "ring"),
    (0, 1, "gather, all terms"),
    (0, 1, "ring, all terms"),
    (1, 2, "gather"),
    (2, 2, "gather"),
    (3, 1, "gather"),
    (3, 2, "ring"),
]


def _recipe(case: tuple[int, int, str], model: Path, pairs: Path, run: Path) -> dict[str, Any]:
    zero_stage, micro_batches, terms = case
    exchange = terms.split(",")[0]
    values = recipe_of((WORLD, zero_stage, micro_batches, exchange, "lora"), model, pairs, run)
    for term in ("symmetric", "between_queries", "between_documents"):
        values["supervised"][term] = "all" in terms
    # Under ZeRO-3 what backward computes again it may gather again.
    values["model"]["activation_checkpointing"] = "none"
    return values


def _train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> None:
    for values in recipes:
        train(parse_recipe(values))


@pytest.fixture(scope="module")
def counted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pairs_file: Path
) -> dict[tuple[int, int, str], dict[str, int]]:
    """The last step's bytes by kind, of rank 0."""
    folder = tmp_path_factory.mktemp("bytes")
    recipes = {
        case: _recipe(case, tiny_model_dir, pairs_file, folder / "-".join(map(str, case))) for case in CASES
    }
    run_ranks(partial(_train_all, recipes=list(recipes.values())), WORLD)
    results = {}
    for case, values in recipes.items():
        last = (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()[-1]
        row = json.loads(last)
        assert row["comm_bytes"] == sum(row["comm_bytes_by_kind"].values())
        results[case] = row["comm_bytes_by_kind"]
    return results


def exchange_bytes(exchange: str) -> dict[str, int]:
    """What the loss sends: documents with their ids, and their gradients. With all terms the queries too, and
    each side is compared twice: with the other one and with itself."""
    pairs = (WORLD - 1) * EXAMPLES // WORLD * 2 * ID_BYTES  # which text is a positive of which query
    texts, times = EXAMPLES * (TEXTS_AN_EXAMPLE - 1) // WORLD, 1
    if "all" in exchange:
        texts, times, pairs = EXAMPLES * TEXTS_AN_EXAMPLE // WORLD, 2, 2 * pairs
    vectors, ids = texts * WIDTH * FP32_BYTES, texts * ID_BYTES
    if "ring" in exchange:
        a_round = 2 * (WORLD - 1) * (vectors + ids) + WORLD * vectors
        return {"send": times * a_round, "all_gather": pairs}
    there = (WORLD - 1) * (vectors + times * ids)
    return {"all_gather": there + pairs, "reduce_scatter": (WORLD - 1) * vectors}


def engine_bytes(zero_stage: int, micro_batches: int) -> dict[str, int]:
    """What DeepSpeed sends, with everything but the embedding under the persistence threshold."""
    share = (WORLD - 1) / WORLD
    gradients = LORA_PARAMETERS * FP32_BYTES * share
    if zero_stage == 0:
        return {"all_reduce": int(2 * gradients)}
    if zero_stage < 3:
        n_reductions = micro_batches if zero_stage == 2 else 1
        return {"all_reduce": int(2 * gradients * n_reductions), "all_gather": int(gradients)}
    n_forwards = 1 if micro_batches == 1 else 2 * micro_batches
    persistent = (TRUNK_PARAMETERS - EMBEDDING + LORA_PARAMETERS) * FP32_BYTES
    gathered = n_forwards * EMBEDDING * FP32_BYTES + persistent
    return {"reduce_scatter": int(gradients * micro_batches), "all_gather": int(gathered * share)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_count_equals_formula(
    case: tuple[int, int, str], counted: dict[tuple[int, int, str], dict[str, int]]
) -> None:
    zero_stage, micro_batches, exchange = case
    expected: dict[str, int] = {}
    for part in (exchange_bytes(exchange), engine_bytes(zero_stage, micro_batches)):
        for kind, n_bytes in part.items():
            expected[kind] = expected.get(kind, 0) + n_bytes
    for kind in {*expected, *counted[case]}:
        difference = counted[case].get(kind, 0) - expected.get(kind, 0)
        assert 0 <= difference <= SCALARS, (kind, counted[case], expected)


@pytest.mark.parametrize("terms", ["gather", "ring", "gather, all terms", "ring, all terms"])
def test_the_planner_counts_the_vectors_too(terms: str, tmp_path: Path) -> None:
    recipe = parse_recipe(_recipe((0, 1, terms), tmp_path, tmp_path / "pairs.jsonl", tmp_path / "run"))
    nothing = {"gradient_bytes": 0, "weight_bytes": 0, "recomputes": False}
    planned = step_bytes(workload(recipe, WORLD), {}, width=WIDTH, **nothing)  # type: ignore[arg-type]
    ids_of_texts_and_pairs = ID_BYTES * EXAMPLES * (TEXTS_AN_EXAMPLE + 2)
    assert abs(sum(exchange_bytes(terms).values()) - planned) <= ids_of_texts_and_pairs


def test_gather_and_ring_differ_and_stages_differ(
    counted: dict[tuple[int, int, str], dict[str, int]],
) -> None:
    assert "send" not in counted[0, 1, "gather"]
    assert len({tuple(sorted(kinds.items())) for kinds in counted.values()}) == len(CASES)


def test_a_collective_that_nobody_counts_is_refused_by_name() -> None:
    class Backend:
        def whisper(self) -> None:
            pass

        def barrier(self) -> str:
            return "met"

    backend = CountedBackend(Backend())
    assert backend.barrier() == "met"
    with pytest.raises(RuntimeError, match="DeepSpeed calls whisper of its backend"):
        backend.whisper()


def test_all_that_deepspeed_can_call_is_known() -> None:
    from deepspeed.comm.torch import TorchBackend

    methods = {name for name in dir(TorchBackend) if not name.startswith("_")}
    unknown = {name for name in methods if callable(getattr(TorchBackend, name))} - MESSAGES.keys() - SILENT
    assert unknown <= {"scatter", "batch_isend_irecv"}
