"""Reads the texts of a source by row. There is exactly one for each row, so vector n belongs to row n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from llm2vec_ds.data.sources import Source, stream_texts

UNREADABLE = ("binary", "not UTF-8", "bad rows")


@dataclass(frozen=True)
class TextRows:
    """Rows `start:stop` of a source. Each iteration reads them again. None stands for an unreadable line.

    Attributes:
        key: where the user sets the column, for messages.
        bad_rows: `raise` an error for a row that breaks its format, or `skip` it: it becomes None.
    """

    source: Source
    column: str
    start: int
    stop: int
    key: str = "--text-column"
    bad_rows: str = "raise"

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[str | None]:
        return islice(_rows(self.source, self.column, self.key, self.bad_rows), self.start, self.stop)


def count_rows(source: Source, column: str, key: str = "--text-column", bad_rows: str = "raise") -> int:
    """Returns how many rows `source` has. Reads all of it.

    Raises:
        UserError: as `stream_texts`.
    """
    return sum(1 for _ in _rows(source, column, key, bad_rows))


def _rows(source: Source, column: str, key: str, bad_rows: str) -> Iterator[str | None]:
    counts: Counter[str] = Counter()
    n_yielded = 0

    def unreadable() -> Iterator[None]:
        nonlocal n_yielded
        n_found = sum(counts[reason] for reason in UNREADABLE)
        yield from [None] * (n_found - n_yielded)
        n_yielded = n_found

    for text in stream_texts(source, column, counts, whole=False, key=key, bad_rows=bad_rows):
        yield from unreadable()
        yield text
    yield from unreadable()
