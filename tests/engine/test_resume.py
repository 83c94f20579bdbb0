"""A resumed run equals the uninterrupted one: bit by bit, or to 1e-5 where the ranks are others."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2vec_ds.engine import trainable_state
from llm2vec_ds.engine.checkpoint import CheckpointStore
from llm2vec_ds.engine.run import train
from llm2vec_ds.engine.trainable_state import TrainableState
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.mntp.objective import MntpStage
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, cut_off, recipe

DROPOUT = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.1}}
FULL = {"adapter": None}
CUT = 3


def _train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> None:
    trainable_state.PART_BYTES = 2**15  # several parts, so that ranks take turns
    for values in recipes:
        train(parse_recipe(values))


def run_all(recipes: list[dict[str, Any]], world: int) -> None:
    run_ranks(partial(_train_all, recipes=recipes), world)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder" / "model.safetensors")


def recipe_of(stage: str, zero_stage: int, model: Path, texts: Path, output: Path, **changes: Any) -> Any:
    changes.setdefault("deepspeed", f"ds_configs/zero{zero_stage}.json" if zero_stage else None)
    values = recipe(stage, model, texts, output, **changes)
    values["checkpoint"] = {"every_steps": CUT, "keep_last": 9}
    return values


CASES = [
    ("simcse", 0, 1, DROPOUT),
    ("simcse", 1, 2, DROPOUT),
    ("simcse", 2, 2, FULL),
    ("simcse", 3, 2, DROPOUT),
    ("mntp", 3, 2, FULL),
    ("mntp", 0, 2, DROPOUT),
]


@pytest.mark.parametrize("world", [1, 2])
def test_resumed_equals_uninterrupted_bit_by_bit(
    world: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    """Attention and adapter dropout on."""
    whole, resumed = [], []
    for stage, zero_stage, n_ranks, changes in CASES:
        if n_ranks != world:
            continue
        folder = tmp_path / f"{stage}-{zero_stage}"
        values = recipe_of(stage, zero_stage, tiny_model_dir, texts_file, folder, **changes)
        values[stage]["attention_dropout"] = 0.2
        whole.append(values)
    run_all(whole, world)
    for values in whole:
        resumed.append(cut_off(values, Path(f"{values['output_dir']}-resumed")))
    run_all(resumed, world)
    for first, second in zip(whole, resumed, strict=True):
        expected, found = Path(first["output_dir"]), Path(second["output_dir"])
        assert [row["step"] for row in rows_of(found)] == [1, 2, 3, 4, 5, 6]
        for row, other in zip(rows_of(found), rows_of(expected), strict=True):
            assert (row["loss"], row["grad_norm"]) == (other["loss"], other["grad_norm"]), found
        assert len({row["loss"] for row in rows_of(found)}) == 6
        weights = weights_of(expected)
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(found).items())


def test_other_ranks_and_zero_stages_go_on_with_the_same_losses(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    """LoRA and full training, from one process to two ranks and back, ZeRO 0 to 3."""
    starts = {}
    for name, changes in (("lora", NO_DROPOUT), ("full", FULL)):
        folder = tmp_path / name
        starts[name] = recipe_of("simcse", 0, tiny_model_dir, texts_file, folder, **changes)
    run_all(list(starts.values()), 1)
    resumed = []
    for name, values in starts.items():
        for zero_stage in (0, 1, 2, 3):
            own = cut_off(values, tmp_path / f"{name}-{zero_stage}")
            config = f"ds_configs/zero{zero_stage}.json" if zero_stage else None
            resumed.append(own | {"deepspeed": config})
    run_all(resumed, 2)
    for values in resumed:
        found = Path(values["output_dir"])
        expected = tmp_path / found.name.partition("-")[0]
        for row, other in zip(rows_of(found), rows_of(expected), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), found
        weights = weights_of(expected)
        for key, value in weights_of(found).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)
    # And back to one process, from what two ranks under ZeRO-3 have written.
    back = []
    for name in starts:
        values = next(v for v in resumed if v["output_dir"].endswith(f"{name}-3"))
        folder = tmp_path / f"{name}-back"
        whole = {**values, "output_dir": str(tmp_path / f"{name}-3")}
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(
            tmp_path / f"{name}-3/checkpoints/step-00000006", folder / "checkpoints/step-00000006"
        )
        back.append(whole | {"output_dir": str(folder), "deepspeed": None})
    run_all(back, 1)
    for values in back:
        found = Path(values["output_dir"])
        for key, value in weights_of(found).items():
            torch.testing.assert_close(
                value, weights_of(tmp_path / found.name.partition("-")[0])[key], rtol=1e-5, atol=1e-5
            )


def test_another_run_is_named_and_refused_unless_forced(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    values = recipe_of("mntp", 0, tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    run_all([values], 1)
    (tmp_path / "run" / "finished").unlink()
    other_texts = tmp_path / "other.txt"
    other_texts.write_text(texts_file.read_text().replace(" a ", " the "))
    changed = {**values, "resume": True, "optimizer": {"lr": 2e-3, "warmup_steps": 2}}
    changed["data"] = {**values["data"], "path": str(other_texts)}
    with pytest.raises(UserError) as refused:
        train(parse_recipe(changed))
    assert "optimizer.lr was 0.001, now 0.002; the training data have changed" in str(refused.value)
    assert "resume=force" in str(refused.value)
    train(parse_recipe({**changed, "resume": "force"}))
    assert len(rows_of(tmp_path / "run")) == 6


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_moments_that_cannot_be_saved_begin_anew(
    zero_stage: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, weights are those of the checkpoint, and the first step is Adam's first: of size lr."""
    whole = TrainableState.__init__
    monkeypatch.setattr(
        TrainableState, "__init__", lambda self, engine, **_: whole(self, engine, has_moments=False)
    )
    values = recipe_of("mntp", zero_stage, tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    values["optimizer"] = {"lr": 1e-3, "schedule": "constant", "max_grad_norm": 0}
    train(parse_recipe(values))
    resumed = cut_off(values, tmp_path / "resumed")
    train(parse_recipe(resumed))
    folders = [tmp_path / name / "checkpoints" for name in ("run", "resumed")]
    assert rows_of(tmp_path / "resumed")[3]["loss"] == rows_of(tmp_path / "run")[3]["loss"]
    last = load_parts(folders[1] / "step-00000006")
    assert last
    assert all(key.endswith(("/value", "/step")) for key in last)
    assert {float(value) for key, value in last.items() if key.endswith("/step")} == {3.0}


def load_parts(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for part in folder.glob("*.safetensors") for key, value in load_file(part).items()}


def test_a_changed_model_is_noticed(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    """Same configuration and size, other weights; the same weights at another place are the same model."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    values = recipe_of("mntp", 0, tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    train(parse_recipe({**values, "max_steps": 3}))
    moved = {**values, "max_steps": 3, "resume": True, "model": {"path": str(model)}}
    (tmp_path / "run" / "finished").unlink()
    train(parse_recipe(moved))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run" / "finished").unlink()
    with pytest.raises(UserError, match=r"of another run \(the model to start from has changed\)"):
        train(parse_recipe(moved))


def test_finished_is_left_alone_and_an_empty_folder_begins(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = recipe_of("mntp", 0, tiny_model_dir, texts_file, tmp_path / "run", resume=True, **NO_DROPOUT)
    train(parse_recipe(values))
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train(parse_recipe(values))
    assert "finished already" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_score_that_is_no_number_is_never_the_best(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_of("mntp", 0, tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    values["data"]["held_out_path"] = str(texts_file)
    values |= {"held_out_every_steps": 1, "max_steps": 3}
    values["checkpoint"] = {"best_by": "loss"}
    scores, measured = iter([float("nan"), float("nan"), 0.5, 0.6]), MntpStage.held_out
    monkeypatch.setattr(MntpStage, "held_out", lambda *of: {**measured(*of), "loss": next(scores)})
    train(parse_recipe(values))
    best = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=1, best_by="loss").best()
    assert best is not None
    assert (best.step, best.manifest.score, best.manifest.score_of) == (2, 0.5, "loss")


def test_the_best_checkpoint_is_kept_and_becomes_the_encoder(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real run whose scores are told to it; of two that are equal the earlier."""
    values = recipe_of("mntp", 0, tiny_model_dir, texts_file, tmp_path / "run", **NO_DROPOUT)
    values["data"]["held_out_path"] = str(texts_file)
    values |= {"held_out_every_steps": 1, "max_steps": 8, "optimizer": {"lr": 1e-2, "schedule": "constant"}}
    values["checkpoint"] = {"every_steps": 1, "keep_last": 1, "best_by": "accuracy", "lowest_is_best": False}
    scores, best = iter([0, 0.1, 0.3, 0.2, 0.9, 0.5, 0.9, 0.4, 0.6]), 4
    measured = MntpStage.held_out
    with monkeypatch.context() as told:
        told.setattr(MntpStage, "held_out", lambda *of: {**measured(*of), "accuracy": next(scores)})
        train(parse_recipe(values))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000008"]
    short = {**values, "output_dir": str(tmp_path / "short"), "max_steps": best, "checkpoint": {}}
    train(parse_recipe(short))
    expected = weights_of(tmp_path / "short")
    for name, value in weights_of(tmp_path / "run").items():
        assert torch.equal(value, expected[name])
