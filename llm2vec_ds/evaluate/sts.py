"""Measures semantic textual similarity: does cosine similarity rank sentence pairs as people do?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from llm2vec_ds.data.row_files import BadRows, format_or_none, rows_of, table_rows
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError

COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class GradedPairs:
    """Sentence pairs, and how similar people find them (on any increasing scale)."""

    first: list[str]
    second: list[str]
    scores: list[float]


def load_graded_pairs(path: str | Path) -> GradedPairs:
    """Reads the columns sentence1, sentence2 and score of a file.

    A .csv or .tsv file may lack a header. Then these are its first three columns. A .jsonl, .json or .parquet
    file names them.

    Raises:
        UserError: the file is missing, or a row does not hold two sentences and a number.
    """
    path = Path(path)
    if format_or_none(path) in (None, ".csv", ".tsv"):
        rows, places = _table(path)
    else:
        found = list(rows_of(path, COLUMNS, BadRows()))
        rows = [list(COLUMNS), *([_given(row.get(name)) for name in COLUMNS] for row, _ in found)]
        places = ["", *(place for _, place in found)]
    columns = [0, 1, 2]
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if "score" in names:
        try:
            columns = [names.index(name) for name in ("sentence1", "sentence2", "score")]
        except ValueError:
            raise UserError(f"{path}: the header must name sentence1, sentence2 and score") from None
        rows, places = rows[1:], places[1:]
    pairs = GradedPairs([], [], [])
    for place, row in zip(places, rows, strict=True):
        try:
            first, second, score = (row[column] for column in columns)
        except IndexError:
            raise UserError(f"{place}: expected sentence1, sentence2, score (a number)") from None
        if not first.strip() or not second.strip():
            raise UserError(f"{place}: a sentence is empty: remove the row")
        try:
            pairs.scores.append(_number(score))
        except ValueError:
            fix = "write it as 3.5"
            if not pairs.scores and len(rows) == len(places) and "score" not in names:
                fix = f"the columns need the names {', '.join(COLUMNS)}, or this order without a header"
            raise UserError(f"{place}: the score {score!r} is no number: {fix}") from None
        pairs.first.append(first)
        pairs.second.append(second)
    if len(set(pairs.scores)) < 2:
        raise UserError(f"{path}: a rank correlation needs pairs with at least two different scores")
    return pairs


def _table(path: Path) -> tuple[list[list[str]], list[str]]:
    found = list(table_rows(path, BadRows()))
    return [fields for fields, _ in found], [f"{path}, line {line}" for _, line in found]


def _given(value: object) -> str:
    """Returns a text or number as text, and anything else as an empty text."""
    return str(value) if isinstance(value, str | int | float) else ""


def _number(text: str) -> float:
    """Returns the number in a text.

    Raises:
        ValueError: it is no number, or NaN or infinity, which have no rank.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def own_graded_pairs() -> GradedPairs:
    """Returns the pairs that are part of this package, and were written for it."""
    with resources.as_file(resources.files("llm2vec_ds") / "assets" / "sentence_pairs.csv") as path:
        return load_graded_pairs(path)


def sts_spearman(encoder: Encoder, pairs: GradedPairs, *, progress: bool = False) -> float:
    """Returns Spearman's rank correlation of cosine similarity with the graded scores."""
    from scipy.stats import spearmanr

    texts = list(dict.fromkeys(pairs.first + pairs.second))
    vectors = encoder.encode(texts, normalize=True, show_progress=progress)
    row = {text: index for index, text in enumerate(texts)}
    first = vectors[[row[text] for text in pairs.first]]
    second = vectors[[row[text] for text in pairs.second]]
    return float(spearmanr(np.einsum("nd,nd->n", first, second), pairs.scores).statistic)
