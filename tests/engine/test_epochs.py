"""`epochs` is the same run as the `max_steps` that it stands for, killed and gone on with too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import cut_off, recipe

STEPS_PER_EPOCH = 4


@pytest.fixture
def texts_of_four_batches(tmp_path: Path, texts_file: Path) -> Path:
    """And 5 texts more, which fill no batch."""
    texts = texts_file.read_text().splitlines(keepends=True)[: 4 * STEPS_PER_EPOCH + 3]
    path = tmp_path / "texts.txt"
    path.write_text("".join(texts))
    return path


def run(values: dict[str, Any]) -> list[tuple[float, float]]:
    """Loss and learning rate of each step."""
    folder = train(parse_recipe(values))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["lr"]) for row in rows]


def test_epochs_are_steps(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_of_four_batches: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def values(name: str, **changes: Any) -> dict[str, Any]:
        made = recipe("mntp", tiny_model_dir, texts_of_four_batches, tmp_path / name, **changes)
        made["batch"]["global_batch_size"] = 4
        made["checkpoint"] = {"every_steps": 3}
        return made

    by_epochs = values("epochs", epochs=1.5, max_steps=1000)  # which is not read
    with caplog.at_level(logging.INFO):
        steps = run(by_epochs)
    assert "epochs 1.5: 6 steps, 4 an epoch" in caplog.text
    assert steps == run(values("steps", max_steps=6))
    written = load_recipe(tmp_path / "epochs" / "recipe.yaml")
    assert (written.epochs, written.max_steps) == (1.5, 6)

    assert run(cut_off(by_epochs, tmp_path / "killed")) == steps
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(parse_recipe({**by_epochs, "resume": True}))
        train(load_recipe(tmp_path / "epochs" / "recipe.yaml", ["resume=true"]))
    assert caplog.text.count("finished already") == 2
    with pytest.raises(UserError, match=r"epochs was 1\.5, now 2\.0"):
        train(parse_recipe({**by_epochs, "resume": True, "epochs": 2}))
    with pytest.raises(UserError, match=r"epochs was 1\.5, now not set"):
        train(parse_recipe({**values("epochs", max_steps=6), "resume": True}))
