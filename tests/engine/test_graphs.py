"""Whole runs with recorded passes, by the stand-in for CUDA graphs: the same as runs without."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_ds.engine import graphs, trainer
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.graphs.proof import Proof
from llm2vec_ds.model.hidden_states import seeded_hidden_states
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.ranks import run_ranks
from tests.support.recorded_operations import RecordedOperations
from tests.support.runs import ROOT, command, cut_off, recipe, write_recipe

DROPOUT = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.2, "zero_init": False}}
ZERO_STAGES = (0, 1, 2)


def train_all(rank: int, world: int, runs: list[dict[str, Any]], *, recorded: bool) -> list[int]:
    """Trains with recordings, or eagerly with the same seeds; replays of each run."""
    counts = []
    for values in runs:
        stand_in = RecordedOperations()
        with (
            mock.patch.object(graphs, "CudaRecorder", return_value=stand_in),
            mock.patch.object(graphs, "_obstacle", return_value=None),
            mock.patch.object(trainer, "use_graphs", graphs.use_graphs if recorded else eager),
        ):
            train(parse_recipe(values))
        counts.append(stand_in.n_replays)
    return counts


def eager(recipe: Any, stage: Any, engine: Any) -> None:
    stage.encoder.run_trunk = partial(seeded_hidden_states, stage.encoder.trunk)


def outcome(values: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    folder = Path(values["output_dir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "encoder" / "model.safetensors")


def recipes(model: Path, texts: Path, pairs: Path, folder: Path) -> list[dict[str, Any]]:
    """MNTP, SimCSE and a supervised run with cached vectors, each at another ZeRO stage."""
    found = []
    for stage, zero in zip(("mntp", "simcse", "supervised"), ZERO_STAGES, strict=True):
        own = recipe("mntp", model, texts, folder / stage, max_steps=3, **DROPOUT)
        own["deepspeed"] = str(ROOT / "ds_configs" / f"zero{zero}.json") if zero else None
        if stage != "mntp":
            del own["mntp"]
            own |= {"stage": stage, stage: {"scale": 5.0}}
        if stage == "simcse":
            own["simcse"]["attention_dropout"] = 0.0
            own["batch"]["micro_batch_tokens"] = 600  # one micro-batch keeps its graph
        if stage == "supervised":
            own["data"] = {"path": str(pairs), "max_tokens": 64}
        else:
            own["data"]["held_out_path"] = str(texts)
        found.append(own)
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_with_and_without_recordings_are_the_same(
    world: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path, pairs_file: Path
) -> None:
    both = {}
    for recorded in (False, True):
        runs = recipes(tiny_model_dir, texts_file, pairs_file, tmp_path / str(recorded))
        counts = run_ranks(partial(train_all, runs=runs, recorded=recorded), world)
        assert all(bool(count) == recorded for of_rank in counts for count in of_rank)
        both[recorded] = [outcome(values) for values in runs]
    for (rows, weights), (expected, expected_weights) in zip(both[True], both[False], strict=True):
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert 0 < row["fill_share"] < 0.6
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-5)


def resumed(rank: int, world: int, values: dict[str, Any], folder: str) -> None:
    train_all(rank, world, [values], recorded=True)
    train_all(rank, world, [cut_off(values, Path(folder))], recorded=True)


def test_a_run_with_recordings_goes_on_to_the_bit(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "whole", **DROPOUT)
    values["checkpoint"] = {"every_steps": 3}
    run_ranks(partial(resumed, values=values, folder=str(tmp_path / "cut")), 1)
    rows, weights = outcome(values)
    again, weights_again = outcome({**values, "output_dir": str(tmp_path / "cut")})
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def disproved(rank: int, world: int, values: dict[str, Any]) -> str:
    """What a run says whose replays are not the passes; it goes on without where that is allowed."""
    wrong = Proof("layers.0.mlp", 0.5)
    with mock.patch.object(graphs, "prove", return_value=wrong):
        try:
            counts = train_all(rank, world, [values], recorded=True)
        except UserError as error:
            return str(error)
    return f"{counts[0]} replays"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("auto", "0 replays"),
        (True, "is on, but replays differ from eager passes by 5.0e-01 in layers"),
    ],
)
def test_replays_that_differ_are_not_used(
    asked: Any, said: str, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1, **DROPOUT)
    values["model"]["cuda_graphs"] = asked
    (found,) = run_ranks(partial(disproved, values=values), 1)
    assert said in found


def without_memory(rank: int, world: int, values: dict[str, Any]) -> str:
    """What a run logs whose recordings do not fit; it goes on without them, and claims no proof."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    with (
        mock.patch.object(RecordedOperations, "record", side_effect=full),
        mock.patch.object(graphs.log, "log") as said,
        mock.patch.object(graphs.log, "info") as claimed,
    ):
        counts = train_all(rank, world, [values], recorded=True)
    return f"{counts} {said.call_args.args[-1]} {claimed.called}"


def test_recordings_that_do_not_fit_are_not_taken_for_proven(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1, **DROPOUT)
    assert run_ranks(partial(without_memory, values=values), 1) == ["[0] memory is full False"]


def test_a_cpu_has_no_graphs(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1)
    values["model"]["cuda_graphs"] = "on"
    outcome = command(["train", str(write_recipe(values, tmp_path / "recipe.yaml"))])
    assert outcome.returncode == 2
    assert "model.cuda_graphs is on, but the device is cpu: set it to off or auto" in outcome.stderr


def test_a_proof_that_is_no_number_does_not_hold() -> None:
    assert not Proof("x", float("nan")).holds
    assert not Proof("x", 2e-3).holds
    assert Proof("x", 0.0).holds
