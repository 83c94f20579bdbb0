"""Semantic textual similarity: does cosine similarity rank sentence pairs as people do?"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class GradedPairs:
    """Sentence pairs and how alike people find them (any increasing scale)."""

    first: list[str]
    second: list[str]
    scores: list[float]


def load_graded_pairs(path: str | Path) -> GradedPairs:
    """A CSV with sentence1, sentence2, score: named by a header, or the first three columns without one.

    Raises:
        UserError: the file is missing, or a row does not hold two sentences and a number.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
    columns = [0, 1, 2]
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if "score" in names:
        try:
            columns = [names.index(name) for name in ("sentence1", "sentence2", "score")]
        except ValueError:
            raise UserError(f"{path}: the header must name sentence1, sentence2 and score") from None
        rows = rows[1:]
    pairs = GradedPairs([], [], [])
    for number, row in enumerate(rows, 1):
        try:
            first, second, score = (row[column] for column in columns)
            pairs.scores.append(_number(score))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, data row {number}: expected sentence1, sentence2, score (a number)"
            ) from None
        pairs.first.append(first)
        pairs.second.append(second)
    if len(set(pairs.scores)) < 2:
        raise UserError(f"{path}: a rank correlation needs pairs with at least two different scores")
    return pairs


def _number(text: str) -> float:
    """Raises ValueError for NaN and infinity too: they have no rank."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def own_graded_pairs() -> GradedPairs:
    """The pairs that come with this package, written for it."""
    with resources.as_file(resources.files("llm2vec_ds") / "assets" / "sentence_pairs.csv") as path:
        return load_graded_pairs(path)


def sts_spearman(encoder: Encoder, pairs: GradedPairs, *, progress: bool = False) -> float:
    """Spearman's rank correlation of cosine similarity with the graded scores."""
    from scipy.stats import spearmanr

    texts = list(dict.fromkeys(pairs.first + pairs.second))
    vectors = encoder.encode(texts, normalize=True, show_progress=progress)
    row = {text: index for index, text in enumerate(texts)}
    first = vectors[[row[text] for text in pairs.first]]
    second = vectors[[row[text] for text in pairs.second]]
    return float(spearmanr(np.einsum("nd,nd->n", first, second), pairs.scores).statistic)
