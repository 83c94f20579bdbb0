"""The moving average equals one computed from the weights of every step, whatever holds them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.engine.run import train
from llm2vec_ds.planner.states import states
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT, recipe

STEPS, DECAY = 6, 0.3
Tensors = dict[str, torch.Tensor]


def recipe_of(zero_stage: int, trains: str, model: Path, texts: Path, output: Path) -> dict[str, Any]:
    adapter = NO_DROPOUT["adapter"] if trains == "lora" else None
    values = recipe("simcse", model, texts, output, adapter=adapter)
    values |= {"optimizer": {"lr": 1e-2, "schedule": "constant", "ema": DECAY}}
    values |= {"checkpoint": {"every_steps": 1, "keep_last": 99}}
    return {**values, "deepspeed": str(ROOT / f"ds_configs/zero{zero_stage}.json") if zero_stage else None}


def stored(run: Path, step: int, stem: str, key: str = "value") -> Tensors:
    files = (run / "checkpoints" / f"step-{step:08d}").glob(f"{stem}-*.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {n.removesuffix(f"/{key}"): tensor for n, tensor in found.items() if n.endswith(f"/{key}")}


def check_averages(run: Path) -> Tensors:
    """In double precision, step by step; the last average."""
    expected = {name: value.double() for name, value in stored(run, 1, "part").items()}
    for step in range(1, STEPS + 1):
        kept = min(DECAY, step / (9 + step))
        for name, value in stored(run, step, "part").items():
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
        found = stored(run, step, "average")
        assert found.keys() == expected.keys()
        for name, average in found.items():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)
    moved = max((expected[n] - value).abs().max() for n, value in stored(run, STEPS, "part").items())
    assert moved > 1e-3
    return {name: value.float() for name, value in expected.items()}


def _train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> None:
    for values in recipes:
        train(parse_recipe(values))


def test_it_is_that_of_all_steps_and_the_encoder_takes_it(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Full training, so that the encoder's weights are the average itself; measured is the average too."""
    sums = []

    def evaluation(encoder: Encoder) -> dict[str, float]:
        sums.append(float(next(encoder.trunk.parameters()).detach().double().sum()))
        return {"sum": sums[-1]}

    values = recipe_of(0, "full", tiny_model_dir, texts_file, tmp_path / "run")
    train(parse_recipe({**values, "evaluation": {"tasks": ["sts:x.csv"], "every_steps": 2}}), evaluation)
    averages = check_averages(tmp_path / "run")
    for name, weight in load_file(tmp_path / "run" / "encoder" / "model.safetensors").items():
        torch.testing.assert_close(weight, averages[f"encoder.trunk.{name}"], rtol=1e-6, atol=1e-7)
    (first,) = [name for name in averages if name.endswith("embed_tokens.weight")]
    assert sums[-1] == pytest.approx(float(averages[first].double().sum()), abs=1e-4)
    assert len(sums) == 4
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000003", cut / "checkpoints" / "step-00000003")
    train(parse_recipe({**values, "output_dir": str(cut), "resume": True}))
    for file in ("encoder/model.safetensors", "checkpoints/step-00000006/average-00000.safetensors"):
        ones, others = load_file(cut / file), load_file(tmp_path / "run" / file)
        assert all(torch.equal(ones[name], others[name]) for name in others)


@pytest.mark.slow
def test_it_is_that_of_all_steps_in_parts(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    cases = [(2, "full"), (3, "lora")]
    recipes = [recipe_of(*case, tiny_model_dir, texts_file, tmp_path / f"{case[0]}") for case in cases]
    run_ranks(partial(_train_all, recipes=recipes), 2)
    for zero, _ in cases:
        check_averages(tmp_path / f"{zero}")


@pytest.mark.slow
def test_the_same_in_parts(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    """ZeRO 1 to 3 on two ranks, and gone on with on them from a checkpoint of one process."""
    cases = [(1, "lora"), (2, "full"), (3, "lora"), (0, "lora")]
    make = partial(recipe_of, model=tiny_model_dir, texts=texts_file)
    recipes = [make(zero, trains, output=tmp_path / f"{zero}") for zero, trains in cases]
    train(parse_recipe(make(0, "lora", output=tmp_path / "one")))
    for zero in (2, 3):
        name = f"checkpoints/step-{3:08d}"
        shutil.copytree(tmp_path / "one" / name, tmp_path / f"on{zero}" / name)
        recipes.append({**make(zero, "lora", output=tmp_path / f"on{zero}"), "resume": True})
    run_ranks(partial(_train_all, recipes=recipes), 2)
    alone = check_averages(tmp_path / "one")
    for zero, trains in cases:
        averages = check_averages(tmp_path / f"{zero}")
        for name, average in averages.items() if trains == "lora" else ():
            torch.testing.assert_close(average, alone[name], rtol=1e-4, atol=1e-5)
    encoder = load_file(tmp_path / "one" / "encoder" / "model.safetensors")
    for run in ("0", "1", "3", "on2", "on3"):
        for name, weight in load_file(tmp_path / run / "encoder" / "model.safetensors").items():
            torch.testing.assert_close(weight, encoder[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_one_is_named(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    values = recipe_of(0, "lora", tiny_model_dir, texts_file, tmp_path / "run")
    plain = {**values, "optimizer": {**values["optimizer"], "ema": None}, "max_steps": 2}
    train(parse_recipe(plain))
    with pytest.raises(Exception, match="there is no moving average in it"):
        train(parse_recipe({**values, "resume": "force"}))


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 2}, {"stage": 3}])
def test_the_planner_counts_it(zero: dict[str, Any]) -> None:
    shapes = [torch.Size([64, 32])] * 4

    def optimizer(averaged: bool) -> int:
        return states(0, [], shapes, torch.bfloat16, zero, 2, averaged=averaged).optimizer

    whole = 4 * 4 * 64 * 32
    assert optimizer(True) - optimizer(False) == (whole if zero["stage"] == 0 else whole // 2)
