"""Reads pairs with a score for each document of a query. A judge, such as a reranker, gave the scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.data.row_files import BadRows
from llm2vec_ds.data.sources import LONGEST_TEXT_CHARACTERS, Source, as_text, source_rows, value_of
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
    source: Source, pairs: PairsConfig, score_column: str | None, key: str, bad_rows: str = "raise"
) -> Iterator[ScoredRow]:
    """Yields all rows in order, also those with blank texts.

    Args:
        score_column: column with a list of numbers, one per document. None: scores are not read.
        key: where the user sets this column.
        bad_rows: `raise` an error for a row without readable texts, or `skip` it. Bad scores are
            always an error.

    Raises:
        UserError: a column is missing, scores are no numbers, or there is not one score per document.
    """
    columns = [pairs.query_column, pairs.positive_column, *([score_column] if score_column else [])]
    bad = BadRows(bad_rows)
    for row, place in source_rows(source, columns, bad, [pairs.negative_column]):
        try:
            query, positive, *negatives = _texts_of(row, pairs, place)
        except UserError as error:
            bad.found(str(error))
            continue
        found = _scores(row, score_column, place, key) if score_column else None
        if found is not None and len(found) != 1 + len(negatives):
            raise UserError(
                f"{place}: column {score_column!r} has {len(found)} scores for {1 + len(negatives)} "
                "documents (the positive, then the negatives): give one score per document"
            )
        yield ScoredRow(query, positive, negatives, found, place)


def _texts_of(row: dict[str, Any], pairs: PairsConfig, place: str) -> list[str]:
    """Returns query, positive and negatives."""
    negative = row.get(pairs.negative_column)
    listed = negative if isinstance(negative, list) else [] if negative is None else [negative]
    named = (
        (pairs.query_column, value_of(row, pairs.query_column, place, "the column of queries")),
        (pairs.positive_column, value_of(row, pairs.positive_column, place, "the column of positives")),
        *((pairs.negative_column, value) for value in listed),
    )
    return [as_text(value, column, place)[:LONGEST_TEXT_CHARACTERS] for column, value in named]


def _scores(row: dict[str, Any], column: str, place: str, key: str) -> list[float]:
    value = value_of(row, column, place, key)
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
