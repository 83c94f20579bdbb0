"""A run that learns nothing says so, and one that learns is left alone."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.engine.progress_check import MANY_STEPS, ProgressCheck
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.spread import ALIKE, distance_from_first
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer


def look(
    check: ProgressCheck, *, still: str = "", alike: str = "", losses: list[float] | None = None
) -> None:
    """Steps by letter: `x` is dead."""
    n_steps = max(len(still), len(alike), len(losses or []))
    marks = (still.ljust(n_steps, "."), alike.ljust(n_steps, "."), losses or [1.0] * n_steps)
    for step, (no_gradient, one_vector, loss) in enumerate(zip(*marks, strict=True)):
        check.look(step + 1, loss=loss, still=no_gradient == "x", vectors_alike=one_vector == "x")


@pytest.mark.parametrize(
    ("n_steps", "still", "alike", "words"),
    [
        (100, "x" * MANY_STEPS, "", "step 20: for 20 step(s) the gradient has been exactly zero"),
        (6, "x" * 6, "", "step 6: for 6 step(s) the gradient"),
        (100, "", "." * 30 + "x" * MANY_STEPS, "step 50: for 20 steps all texts of a batch"),
        (6, "", ".xxx", "step 4: for 3 steps all texts of a batch"),
    ],
)
def test_a_dead_run_is_stopped(n_steps: int, still: str, alike: str, words: str) -> None:
    check = ProgressCheck(n_steps, from_start=True)
    look(check, still=still[:-1], alike=alike[:-1])
    with pytest.raises(UserError) as caught:
        look(ProgressCheck(n_steps, from_start=True), still=still, alike=alike)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("n_steps", "still", "alike"),
    [
        (6, "xxxxx.", ""),
        (100, ("x" * 19 + ".") * 5, ("x" * 19 + ".") * 5),
        (1, ".", "x"),
        (1, "x", ""),
    ],
    ids=["a gradient at last", "now and then", "one step", "one step without a gradient"],
)
def test_a_run_that_may_learn_goes_on(n_steps: int, still: str, alike: str) -> None:
    look(ProgressCheck(n_steps, from_start=True), still=still, alike=alike)


@pytest.mark.parametrize(("from_start", "still"), [(True, "." + "x" * 70), (False, "x" * 70)])
def test_a_gradient_that_ends_later_is_said_once(
    from_start: bool, still: str, caplog: pytest.LogCaptureFixture
) -> None:
    look(ProgressCheck(100, from_start=from_start), still=still)
    (record,) = caplog.records
    assert "for 20 step(s) the gradient has been exactly zero" in record.message


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [1.0, 0.9, 1.1, 1.0, 3.0, 9.0, 9.0, 9.0],
            ["the loss has risen from 0.95 to 9 (means of 2 step(s)). This may be chance. If not"],
        ),
        ([1.0, 9.0, 9.0, 0.5, 0.5, 0.5, 0.5, 0.5], []),
        ([0.1], []),
    ],
)
def test_the_last_word(losses: list[float], said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    check = ProgressCheck(len(losses), from_start=True)
    look(check, losses=losses)
    check.last_word()
    assert [record.message.partition(",")[0] for record in caplog.records] == said


def test_one_step_without_a_gradient_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check = ProgressCheck(1, from_start=True)
    look(check, still="x")
    check.last_word()
    assert "no step has had a gradient" in caplog.text


def test_distance_tells_rounding_from_a_difference() -> None:
    torch.manual_seed(0)
    one = torch.randn(4096)
    lengths = torch.tensor([[1.0], [3.0], [0.1]])
    assert distance_from_first((one * lengths) * (1 + 1e-7 * torch.randn(3, 4096))) < ALIKE
    assert distance_from_first(one * lengths + 0.01 * torch.randn(3, 4096)) > ALIKE


def equal_texts(model: Path, folder: Path) -> dict[str, Any]:
    texts = folder / "equal.txt"
    texts.write_text("rain falls\n" * 64)
    return recipe("simcse", model, texts, folder / "run", max_steps=4)


def test_equal_texts_teach_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(
        UserError, match="gradient has been exactly zero.* all texts, or all queries, of the data"
    ):
        train(parse_recipe(equal_texts(tiny_model_dir, tmp_path)))
    assert not (tmp_path / "run" / "encoder").exists()


def blind_model(folder: Path) -> Path:
    """Every token has the same embedding, so every text the same vector."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[5].clone())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _stopped_on_rank(rank: int, world: int, values: dict[str, Any]) -> str:
    try:
        train(parse_recipe(values))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_one_vector_for_all_texts(world: int, tmp_path: Path, texts_file: Path) -> None:
    values = recipe("simcse", blind_model(tmp_path / "m"), texts_file, tmp_path / "run", **NO_DROPOUT)
    said = run_ranks(partial(_stopped_on_rank, values=values), world)
    assert len(set(said)) == 1
    assert said[0].startswith("step 3: for 3 steps all texts of a batch have had the same vector")


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": {"lr": 1e-30}}, {"max_steps": 1}], ids=["zero B", "tiny lr", "one step"]
)
def test_runs_that_are_fine(
    changes: dict[str, Any],
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="llm2vec_ds.engine.progress_check")
    train(parse_recipe(recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run", **changes)))
    assert not [record for record in caplog.records if record.name.endswith("progress_check")]
