"""Evaluation on cases whose right answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.retrieval import RetrievalSet, ndcg_at_10
from llm2vec_ds.evaluate.sts import GradedPairs, load_graded_pairs, sts_spearman


class FakeEncoder:
    """Vectors by table."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table = table

    def encode(self, texts: list[str], *, normalize: bool, show_progress: bool) -> np.ndarray:
        assert normalize
        vectors = np.asarray([self.table[text] for text in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_spearman_is_one_for_the_right_order_and_minus_one_for_its_reverse() -> None:
    encoder = FakeEncoder({"a": [1, 0], "b": [1, 0.1], "c": [1, 1], "d": [0, 1]})
    pairs = GradedPairs(["a", "a", "a"], ["b", "c", "d"], [5.0, 2.5, 0.0])
    assert sts_spearman(encoder, pairs) == pytest.approx(1.0)  # type: ignore[arg-type]
    reverse = GradedPairs(pairs.first, pairs.second, pairs.scores[::-1])
    assert sts_spearman(encoder, reverse) == pytest.approx(-1.0)  # type: ignore[arg-type]


def test_ndcg_by_hand() -> None:
    encoder = FakeEncoder({"q": [1, 0], "x": [1, 0], "y": [1, 1], "z": [0, 1]})
    data = RetrievalSet(["q"], ["x", "y", "z"], np.array([[False, True, True]]))
    gain = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = 1 + 1 / math.log2(3)
    assert ndcg_at_10(encoder, data) == pytest.approx(gain / ideal)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        'one,two,3\n"three, four",five,1.5\n',
        'score,sentence1,sentence2,x\n3,one,two,\n1.5,"three, four",five,\n',
    ],
    ids=["without header", "with header"],
)
def test_csv_with_and_without_header(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    pairs = load_graded_pairs(path)
    assert pairs == GradedPairs(["one", "three, four"], ["two", "five"], [3.0, 1.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least two different scores"),
        ("one,two,3\n", "at least two different scores"),
        ("one,two,3\none,two\n", "line 2: expected sentence1, sentence2, score"),
        ("one,two,3\none,two,high\n", "line 2"),
        ("text,score\none,3\n", "header must name"),
    ],
)
def test_unusable_csv(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_graded_pairs(path)
