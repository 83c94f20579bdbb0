"""Planned beside measured, a full memory explained, and the smaller start that all ranks agree on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.engine import memory
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.embedding_cache import ScaledEncoder
from llm2vec_ds.objectives.mntp.head import MntpModel
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT, recipe


def rows_of(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def full_above(monkeypatch: pytest.MonkeyPatch, model: type, n_tokens: int) -> None:
    """As a GPU whose memory holds micro-batches of that many tokens only."""
    forward = model.forward  # type: ignore[attr-defined]

    def limited(self: Any, batch: PackedBatch) -> Any:
        if batch.n_tokens > n_tokens:
            raise torch.OutOfMemoryError(f"no memory for {batch.n_tokens} tokens")
        return forward(self, batch)

    monkeypatch.setattr(model, "forward", limited)


def test_planned_beside_measured(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="llm2vec_ds")
    train(parse_recipe(recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=2)))
    said = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert said["planned_peak_mib"] > said["planned_parts_mib"]["activations"] > 0
    assert said["measured_peak_mib"] > 0
    assert any(r.message.startswith("peak memory: planned ") for r in caplog.records)
    # Kept, or as the environment says.
    assert any(r.message.startswith("freed memory ") for r in caplog.records)


def test_a_full_memory_is_explained(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(monkeypatch, MntpModel, 100)
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(parse_recipe(values))
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "memory is full; planned",
        "weights 0.0",
        "batch.micro_batch_tokens=80 (now 160)",
        "model.activation_checkpointing=full",
        "model.quantization=nf4",
        "no memory for 1",
    ):
        assert part in said


def _the_second_does_not_fit_on_one_rank(rank: int, world: int, recipes: list[dict[str, Any]]) -> None:
    fits, full = recipes
    train(parse_recipe(fits))
    if rank == world - 1:
        full_above(pytest.MonkeyPatch(), ScaledEncoder, 200)
    train(parse_recipe(full))


def test_all_ranks_start_smaller_when_one_is_full(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    """The loss does not depend on the token budget, so the halved run equals one that fitted."""
    recipes = []
    for name in ("fits", "full"):
        values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / name, max_steps=2, **NO_DROPOUT)
        values["batch"] |= {"micro_batch_tokens": 640, "halve_if_out_of_memory": True}
        values["deepspeed"] = str(ROOT / "ds_configs" / "zero2.json")
        recipes.append(values)
    run_ranks(partial(_the_second_does_not_fit_on_one_rank, recipes=recipes), 2)
    for row, other in zip(*(rows_of(values["output_dir"]) for values in recipes), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_not_even_one_text_fits(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(monkeypatch, MntpModel, 10)
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    values["batch"]["halve_if_out_of_memory"] = True
    with pytest.raises(UserError, match="not even 64 tokens"):
        train(parse_recipe(values))


def test_the_smaller_start_is_refused_under_zero3(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    values["batch"]["halve_if_out_of_memory"] = True
    values["deepspeed"] = str(ROOT / "ds_configs" / "zero3.json")
    with pytest.raises(UserError, match="does not work under ZeRO-3"):
        train(parse_recipe(values))


def test_a_model_that_cannot_be_planned_trains_all_the_same(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for meta tensors")

    monkeypatch.setattr(memory, "Planner", fails)
    caplog.set_level("WARNING", logger="llm2vec_ds")
    train(parse_recipe(recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1)))
    assert "memory is not planned: no kernel for meta tensors" in caplog.text
    assert not (tmp_path / "run" / "memory.json").exists()
