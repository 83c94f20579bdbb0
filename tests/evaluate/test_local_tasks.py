"""Training files as tasks: pairs to retrieve, and files whose names are labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate import mteb_tasks
from llm2vec_ds.evaluate.mteb_tasks import tasks_for
from llm2vec_ds.evaluate.pair_corpus import corpus_of_pairs


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_a_corpus_and_its_queries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text is one document wherever it stands; a query of two rows has two right ones; blank ones none."""
    rows = [
        {"query": "when?", "positive": "at nine", "negative": ["at sea", "in may"]},
        {"query": "where?", "positive": "at sea"},
        {"query": "when?", "positive": "in may"},
        {"query": "why?", "positive": " "},
        {"query": "", "positive": "at nine"},
    ]
    found = corpus_of_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert [text for _, text in found.corpus.values()] == ["at nine", "at sea", "in may"]
    assert list(found.queries.values()) == ["when?", "where?"]
    assert found.relevant == {"q0": {"d0": 1, "d2": 1}, "q1": {"d1": 1}}
    assert "2 pair(s) with a blank query or positive are left out" in caplog.text
    (task,) = tasks_for([f"retrieval:{tmp_path / 'pairs.jsonl'}"])
    assert task.metadata.name == "Retrieval-pairs"


@pytest.mark.parametrize("kind", ["clustering", "classification"])
def test_files_of_a_folder_are_labels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many different texts of each, of the column `text` or `query`."""
    monkeypatch.setattr(mteb_tasks, "TEXTS_OF_A_FILE", 2)
    monkeypatch.setattr(mteb_tasks, "LEAST_ROWS", 4)
    folder = tmp_path / "sources"
    folder.mkdir()
    write(folder / "web.jsonl", [{"query": text, "positive": "x"} for text in ("a", "b", "a", "c")])
    write(folder / "news.jsonl", [{"text": text} for text in ("d", "d", "e")])
    (task,) = tasks_for([f"{kind}:{folder}"])
    task.load_data()
    (split,) = task.dataset.values()
    texts = split["sentences" if kind == "clustering" else "text"]
    assert sorted(texts) == ["a", "b", "d", "e"]
    labels = split["labels" if kind == "clustering" else "label"]
    assert len(set(labels)) == 2
    assert labels[texts.index("a")] == labels[texts.index("b")]


def test_names_of_files_are_whole_labels_and_part_of_the_revision(tmp_path: Path) -> None:
    """A year in a name is no ending. Other names are other labels, so stored results are of another task."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for year in (2020, 2021):
        write(folder / f"news.{year}.jsonl", [{"text": f"{year} text {i}"} for i in range(5)])
    (task,) = tasks_for([f"clustering:{folder}"])
    task.load_data()
    assert set(task.dataset["test"]["labels"]) == {"news.2020", "news.2021"}
    (folder / "news.2021.jsonl").rename(folder / "web.jsonl")
    (renamed,) = tasks_for([f"clustering:{folder}"])
    assert renamed.metadata.revision != task.metadata.revision


def test_a_classifier_needs_a_row_for_each_part(tmp_path: Path) -> None:
    write(tmp_path / "few.jsonl", [{"text": str(i), "label": i % 2} for i in range(4)])
    with pytest.raises(UserError, match="without a column `split`, a task needs at least 5 rows"):
        tasks_for([f"classification:{tmp_path / 'few.jsonl'}"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "a task needs at least two files, whose names are the labels"),
        ([3], "line 1: expected a text in the column text, or query"),
    ],
)
def test_mistakes_in_a_folder_of_labels(texts: list[Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "news.jsonl", [{"text": text} for text in texts])
    with pytest.raises(UserError, match=message):
        tasks_for([f"clustering:{tmp_path}"])
