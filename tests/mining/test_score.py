"""`score` writes a reranker's own numbers beside each row, in parts or whole; killed, it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds.mining import score as module
from llm2vec_ds.mining.score import ScoreOptions, score
from tests.support.in_process import assert_reads, error_line, run
from tests.support.rerankers import save_reranker
from tests.support.tiny import sentences

ROWS = 10


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reranker(tmp_path_factory.mktemp("reranker"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Rows with no, one and two negatives."""
    texts = sentences(4 * ROWS)
    rows = []
    for i in range(ROWS):
        query, positive, *others = texts[4 * i : 4 * i + 4]
        negative: Any = [None, others[0], others][i % 3]
        rows.append({"query": query, "positive": positive, "negative": negative})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_models_own_numbers_in_parts_or_whole(
    pairs: Path, reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, "score", pairs, "--reranker", reranker, "--output", out) == 0
    model = AutoModelForSequenceClassification.from_pretrained(reranker).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    for i, (row, given) in enumerate(zip(lines(out), lines(pairs), strict=True)):
        assert (row["query"], row["positive"]) == (given["query"], given["positive"])
        assert len(row["negative"]) == i % 3
        for document, found in zip([row["positive"], *row["negative"]], row["scores"], strict=True):
            with torch.no_grad():
                expected = model(**tokenizer(row["query"], document, return_tensors="pt")).logits.item()
            assert found == pytest.approx(expected, abs=1e-4)
    shards = [f"{i}/3" for i in range(3)]
    for shard in shards:
        arguments = ("--reranker", reranker, "--output", tmp_path / "parts", "--shard", shard)
        assert run(monkeypatch, "score", pairs, *arguments) == 0
    joined = [row for file in sorted((tmp_path / "parts").glob("*.jsonl")) for row in lines(file)]
    for row, whole in zip(joined, lines(out), strict=True):
        assert row["scores"] == pytest.approx(whole.pop("scores"), abs=1e-5)
        assert {**whole, "scores": row["scores"]} == row


def test_killed_it_goes_on(
    pairs: Path, reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_BLOCK", 3)
    options, appended = ScoreOptions(str(reranker), str(pairs)), []
    append = module._Scoring._append

    def failing(self: Any, block: Any, scores: Any) -> None:
        if len(appended) == 2:
            self.rows.open("ab").write(b'{"query": "half a ' + 10_000 * b"long ")
            raise KeyboardInterrupt
        append(self, block, scores)
        appended.append(len(block))

    monkeypatch.setattr(module._Scoring, "_append", failing)
    with pytest.raises(KeyboardInterrupt):
        score(options, tmp_path / "out.jsonl")
    appended.append(0)
    assert score(options, tmp_path / "out.jsonl") == ROWS
    assert appended == [3, 3, 0, 3, 1]
    assert len(lines(tmp_path / "out.jsonl")) == ROWS


MISTAKES = {
    ("--output", "TMP/out.csv"): "--output TMP/out.csv must end in .jsonl",
    ("--output", "TMP/pairs.jsonl"): "--output TMP/pairs.jsonl exists: choose another, or give --overwrite",
    ("--output", "TMP/o.jsonl", "--shard", "0/2"): (
        "--shard needs a folder, but --output TMP/o.jsonl is a file: leave out .jsonl"
    ),
    ("--output", "TMP/o.jsonl", "--reranker", "TMP/none"): "--reranker TMP/none: there is no such folder",
    ("--output", "TMP/o.jsonl", "--reranker", "TMP/three"): (
        "--reranker TMP/three gives 3 numbers a pair: use a reranker that gives one"
    ),
    ("--output", "TMP/o.jsonl", "--query-column", "question"): (
        "TMP/pairs.jsonl, line 1: no column 'question': set the column of queries to one of query, "
        "positive, negative"
    ),
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_cost_one_line(
    arguments: tuple[str, ...],
    pairs: Path,
    reranker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_reranker(tmp_path / "three", num_labels=3)
    given = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    if "--reranker" not in given:
        given += ["--reranker", str(reranker)]
    assert run(monkeypatch, "score", pairs, *given) == 2
    assert_reads(error_line(capsys), MISTAKES[arguments].replace("TMP", str(tmp_path)))
