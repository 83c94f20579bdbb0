"""Reads pairs with a score for each document of a query. A judge, such as a reranker, gave the scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.data.row_files import BadRows
from llm2vec_ds.data.sources import LONGEST_TEXT_CHARACTERS, Source, _rows, _text, _value
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import PairsConfig


@dataclass(frozen=True)
class ScoredRow:
    """A row of pairs as it is in its file.

    Attributes:
        scores: of the positive and each negative. None: not read.
    """

    query: str
    positive: str
    negatives: list[str]
    scores: list[float] | None
    place: str

    @property
    def documents(self) -> list[str]:
        return [self.positive, *self.negatives]


def stream_scored_rows(
    source: Source, pairs: PairsConfig, score_column: str | None, key: str
) -> Iterator[ScoredRow]:
    """Yields all rows in order, also those with blank texts.

    Args:
        score_column: column with a list of numbers, one per document. None: scores are not read.
        key: where the user sets this column.

    Raises:
        UserError: a column is missing, scores are no numbers, or there is not one score per document.
    """
    columns = [pairs.query_column, pairs.positive_column, *([score_column] if score_column else [])]
    for row, place in _rows(source, columns, BadRows(), [pairs.negative_column]):
        negative = row.get(pairs.negative_column)
        listed = negative if isinstance(negative, list) else [] if negative is None else [negative]
        query, positive, *negatives = (
            _text(value, column, place)[:LONGEST_TEXT_CHARACTERS]
            for column, value in (
                (columns[0], _value(row, columns[0], place, "the column of queries")),
                (columns[1], _value(row, columns[1], place, "the column of positives")),
                *((pairs.negative_column, value) for value in listed),
            )
        )
        found = _scores(row, score_column, place, key) if score_column else None
        if found is not None and len(found) != 1 + len(negatives):
            raise UserError(
                f"{place}: column {score_column!r} has {len(found)} scores for {1 + len(negatives)} "
                "documents (the positive, then the negatives): give one score per document"
            )
        yield ScoredRow(query, positive, negatives, found, place)


def _scores(row: dict[str, Any], column: str, place: str, key: str) -> list[float]:
    value = _value(row, column, place, key)
    if isinstance(value, str):  # a .csv file
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(
        isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        for score in value
    ):
        raise UserError(
            f"{place}: column {column!r} is no list of finite numbers: write it with llm2vec-ds score"
        )
    return [float(score) for score in value]
