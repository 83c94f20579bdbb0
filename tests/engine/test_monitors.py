"""Metrics go where the recipe's `monitor` says, with the values and steps of metrics.jsonl."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.runs import recipe, trained


def curve(path: Path) -> list[tuple[int, float]]:
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header[0] == "step"
    return [(int(step), float(value)) for step, value in rows]


def test_csv_files_hold_every_step_of_this_run(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    stale = tmp_path / "run" / "monitor" / "csv" / "train_loss.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("step,loss\n1,99\n")  # of the run that is overwritten
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", monitor=["csv"], overwrite=True)
    values["data"]["held_out_path"] = str(texts_file)
    rows = trained(values | {"max_steps": 3})
    folder = tmp_path / "run" / "monitor" / "csv"
    for name in ("loss", "accuracy", "lr", "grad_norm", "n_tokens"):
        assert curve(folder / f"train_{name}.csv") == [
            (row["step"], pytest.approx(row[name])) for row in rows
        ]
    measured = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured] == [0, 3]
    expected = [(row["step"], pytest.approx(row["loss"])) for row in measured]
    assert curve(folder / "held_out_loss.csv") == expected


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_reads_the_same(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = recipe(
        "mntp", tiny_model_dir, texts_file, tmp_path / "run", monitor=["tensorboard"], max_steps=2
    )
    rows = trained(values)
    events = EventAccumulator(str(tmp_path / "run" / "monitor" / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
