"""The time of a step: operations by hand, a speed fitted to steps, and to real runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2vec_ds.planner.measured import measured_speed
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.planner.step_time import Speed, Work, fit_speed
from llm2vec_ds.recipe.files import load_recipe
from tests.support.in_process import error_line, run
from tests.support.runs import recipe, trained, write_recipe

STEPS = [(Work(operations, passes), 0.0) for operations in (1e12, 3e12, 9e12) for passes in (1, 2, 5)]


def timed(speed: Speed, noise: float = 0.0) -> list[tuple[Work, float]]:
    factors = 1 + noise * np.random.default_rng(0).standard_normal(len(STEPS))
    return [(work, speed.seconds(work) * factor) for (work, _), factor in zip(STEPS, factors, strict=True)]


def test_a_speed_is_found_again() -> None:
    fit = fit_speed([timed(Speed(2e11, 0.3))])
    assert fit.speed.operations_per_s == pytest.approx(2e11)
    assert fit.speed.pass_s == pytest.approx(0.3)
    assert fit.error_of_90_percent < 1e-9
    assert fit.left_out_error is None


def test_errors_are_those_of_the_steps() -> None:
    fit = fit_speed([timed(Speed(2e11, 0.3), noise=0.05)])
    assert fit.speed.operations_per_s == pytest.approx(2e11, rel=0.1)
    assert 0.01 < fit.median_error < fit.error_of_90_percent < 0.2


def test_a_run_left_out_shows_what_the_fit_does_not_know() -> None:
    fit = fit_speed([timed(Speed(2e11)), timed(Speed(1e11))])
    assert fit.left_out_error == pytest.approx((0.5 + 1) / 2)  # half the time, and twice
    assert fit.median_error < 0.5


def test_steps_that_are_alike_give_one_rate() -> None:
    fit = fit_speed([[(Work(1e12, 1), 2.0), (Work(1e12, 1), 2.0)]])
    assert fit.speed == Speed(pytest.approx(5e11), 0.0)  # type: ignore[arg-type]


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        fit_speed([[]])


def test_operations_by_hand(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    path = write_recipe(recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run"), tmp_path / "r.yaml")
    work = Planner(load_recipe(path), path).work(n_tokens=1000)
    config = json.loads((tiny_model_dir / "config.json").read_text())
    d, i, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    head = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linear = layers * (d * (q + 2 * kv) + q * d + 3 * d * i)
    forward = 1000 * (2 * linear + 4 * (1000 / 16) * layers * q)
    assert work.operations == pytest.approx(2 * forward + 300 * 4 * config["vocab_size"] * d)
    full = Planner(load_recipe(path, ["model.activation_checkpointing=full"]), path).work(1000)
    assert full.operations - work.operations == pytest.approx(forward)


def test_real_runs_time_a_step_on_a_cpu(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    folders = []
    for stage in ("mntp", "simcse"):
        folders.append(tmp_path / stage)
        trained(recipe(stage, tiny_model_dir, texts_file, folders[-1]))
    fit = measured_speed(folders, torch.device("cpu"))
    assert (fit.n_runs, fit.n_steps) == (2, 10)
    assert fit.left_out_error is not None
    planner = Planner(load_recipe(folders[0] / "recipe.yaml"), folders[0] / "recipe.yaml")
    planner.device = torch.device("cpu")
    time = planner.step_time(fit.speed)
    assert time is not None
    assert 1 < time.total_ms < 60_000


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("recipe.yaml", "has no recipe.yaml: give the folder of a finished run"),
        ("n_ranks", "memory.json has no n_ranks: run it again"),
        ("steps", "has no step after the first, which is a warm-up: give a longer run"),
    ],
)
def test_mistakes(
    missing: str,
    message: str,
    tiny_model_dir: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run")
    path = write_recipe(values, tmp_path / "r.yaml")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "memory.json").write_text("{}" if missing == "n_ranks" else '{"n_ranks": 1}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "n_tokens": 5, "step_ms": 9.0}\n')
    if missing != "recipe.yaml":
        write_recipe(values, folder / "recipe.yaml")
    assert run(monkeypatch, "plan", str(path), "--measured", str(folder)) == 2
    assert f"--measured {folder}" in (line := error_line(capsys))
    assert message in line
