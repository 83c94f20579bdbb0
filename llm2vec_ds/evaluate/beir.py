"""Reads a folder in BEIR's layout (Thakur et al., 2021, arXiv 2104.08663): corpus, queries and relevance."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_ds.data.row_files import BadRows, rows_of, table_rows
from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)

FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


@dataclass(frozen=True)
class Beir:
    """A retrieval data set.

    Attributes:
        corpus: title and text by id.
        queries: text by id.
        relevant: relevance by query and document.
    """

    corpus: dict[str, tuple[str, str]]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]


def read_beir(folder: Path) -> Beir:
    """Reads a data set in BEIR's layout.

    Ids may be whole numbers. The relevance table has three columns, or TREC's four. Its header is optional.

    Raises:
        UserError: a file is missing or damaged, an id occurs twice, or an id does not exist.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"--task retrieval:{folder}: {name} is missing (BEIR's layout)")
    corpus = {
        own: (_text(row.get("title") or "", place), _text(row.get("text"), place))
        for own, row, place in _by_id(folder / FILES[0])
    }
    queries = {own: _text(row.get("text"), place) for own, row, place in _by_id(folder / FILES[1])}
    if same := len(queries.keys() & corpus.keys()):
        log.info(
            "%s: for %s queries, a document has the query's own id. It is ranked unless exclude_self is set",
            folder,
            same,
        )
    return Beir(corpus, queries, _relevant(folder / FILES[2], queries, corpus))


def _by_id(file: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    first: dict[str, str] = {}
    for row, place in rows_of(file, ["_id"], BadRows()):
        own = row.get("_id")
        if not isinstance(own, str | int) or isinstance(own, bool):
            raise UserError(f"{place}: every line needs _id and text, and a title must be a text")
        if (before := first.setdefault(str(own), place)) != place:
            raise UserError(f"{place}: the _id {own!r} occurs twice, first in {before}")
        yield str(own), row, place
    if not first:
        raise UserError(f"{file} holds no row")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: every line needs _id and text, and a title must be a text")
    return value


def _relevant(file: Path, queries: Any, corpus: Any) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for number, (fields, line) in enumerate(table_rows(file, BadRows())):
        place = f"{file}, line {line}"
        fields = fields if len(fields) > 1 else fields[0].split()
        if len(fields) == 4:  # TREC: query, 0, document, relevance
            fields = [fields[0], *fields[2:]]
        try:
            query, document, score = fields
            relevance = int(float(score))
            if relevance != float(score):
                raise ValueError
        except (ValueError, OverflowError):
            if number == 0 and len(fields) == 3 and not _is_number(fields[2]):
                continue  # the header
            raise UserError(f"{place}: expected query-id, corpus-id, score, separated by tabs") from None
        if query not in queries or document not in corpus:
            raise UserError(f"{place}: no such query or document")
        own = relevant.setdefault(query, {})
        if own.setdefault(document, relevance) != relevance:
            raise UserError(f"{place}: {query} and {document} already have another score")
    if not any(score > 0 for own in relevant.values() for score in own.values()):
        raise UserError(f"{file} names no relevant document: one needs a score above 0")
    return relevant


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
