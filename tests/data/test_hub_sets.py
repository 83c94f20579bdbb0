"""Data sets of the hub, as docs/data.md has them: a folder in the hub's layout stands in for one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llm2vec_ds.data.sources import find_source
from llm2vec_ds.errors import UserError
from tests.support.in_process import error_line, run
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import sentences

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: titles
  data_files: [{split: test, path: titles.jsonl}]
- config_name: triplets
  data_files: [{split: train, path: triplets.jsonl}]
---
"""
EXAMPLES = {
    "hub:owner/name ": "texts: 20 rows",
    "hub:owner/name@test ": "texts: 17 rows",
    "hub:owner/name:titles@test": "texts: 18 rows",
    "hub:owner/name:triplets": "triplets: 64 rows",
}
"""What `prepare` says of each; of the last, query, positive and two negatives of 16 examples."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "set"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    texts = sentences(64)
    rows = {
        "train": [{"text": text} for text in texts[:20]],
        "test": [{"text": text} for text in texts[20:37]],
        "titles": [{"title": text, "text": 7} for text in texts[37:55]],
        "triplets": [
            {"anchor": a, "positive": p, "negative_1": n, "negative_2": m}
            for a, p, n, m in zip(texts[:16], texts[16:32], texts[32:48], texts[48:64], strict=True)
        ],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def documented() -> list[str]:
    """The arguments of each example."""
    text = (ROOT / "docs" / "data.md").read_text()
    return re.findall(r"^llm2vec-ds prepare (.*hub:owner/name.*)$", text, re.MULTILINE)


def test_every_example_is_tried() -> None:
    assert len(documented()) == len(EXAMPLES)
    for key, line in zip(EXAMPLES, documented(), strict=True):
        assert key in f"{line} "


@pytest.mark.parametrize(("example", "said"), zip(documented(), EXAMPLES.values(), strict=True))
def test_the_example_is_read(
    example: str,
    said: str,
    stand_in: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    texts = recipe("mntp", tiny_model_dir, Path("none"), Path("run"))
    write_recipe(texts, tmp_path / "recipe.yaml")
    del texts["mntp"]
    write_recipe({**texts, "stage": "supervised"}, tmp_path / "pairs.yaml")
    arguments = example.replace("owner/name", str(stand_in)).split()
    assert run(monkeypatch, "prepare", *arguments) == 0
    assert said in capsys.readouterr().out


def test_a_column_or_split_that_is_not_there_is_named(
    stand_in: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("mntp", tiny_model_dir, Path("none"), tmp_path / "run")
    path = write_recipe(values, tmp_path / "r.yaml")
    assert run(monkeypatch, "prepare", path, f"data.path=hub:{stand_in}", "data.text_column=body") == 2
    assert error_line(capsys).endswith("no column 'body': set data.text_column to one of text")
    assert run(monkeypatch, "prepare", path, f"data.path=hub:{stand_in}@train[:5]") == 2
    assert "Bad split: train[:5]. Available splits: ['train', 'test']" in error_line(capsys)


def test_two_data_sets_of_the_hub_are_refused() -> None:
    with pytest.raises(UserError, match="hub:a/b cannot be combined with others: give one data set"):
        find_source(["hub:a/b", "texts.txt"])
