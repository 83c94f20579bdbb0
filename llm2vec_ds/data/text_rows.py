"""Reads the texts of a source by row. There is exactly one for each row, so vector n belongs to row n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from llm2vec_ds.data.row_files import BadRows
from llm2vec_ds.data.sources import Source, placed_texts

UNREADABLE = ("binary", "not UTF-8", "bad rows")


@dataclass(frozen=True)
class TextRows:
    """Rows `start:stop` of a source. Each iteration reads them again. None stands for an unreadable line.
    The log does not name such lines. `count_rows` has done it.

    Attributes:
        bad_rows: `raise` an error for a row that breaks its format, or `skip` it: it becomes None.
    """

    source: Source
    column: str
    start: int
    stop: int
    bad_rows: str = "raise"

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[str | None]:
        return (text for text, _ in islice(self._placed(), self.start, self.stop))

    def place(self) -> str | None:
        """Returns file and line of the first row. None: it is unreadable, or there is none."""
        return next(islice((place for _, place in self._placed()), self.start, self.stop), None)

    def _placed(self) -> Iterator[tuple[str | None, str | None]]:
        return _rows(self.source, self.column, self.bad_rows, quiet=True)


def count_rows(source: Source, column: str, bad_rows: str = "raise") -> int:
    """Returns how many rows `source` has. Reads all of it.

    Raises:
        UserError: as `stream_texts`.
    """
    return sum(1 for _ in _rows(source, column, bad_rows, quiet=False))


def _rows(
    source: Source, column: str, bad_rows: str, *, quiet: bool
) -> Iterator[tuple[str | None, str | None]]:
    """Yields each row's text and place. Both are None for an unreadable one."""
    counts: Counter[str] = Counter()
    n_yielded = 0

    def unreadable() -> Iterator[tuple[None, None]]:
        nonlocal n_yielded
        n_found = sum(counts[reason] for reason in UNREADABLE)
        yield from [(None, None)] * (n_found - n_yielded)
        n_yielded = n_found

    bad = BadRows(bad_rows, counts, quiet)
    for placed in placed_texts(source, column, bad, whole=False, key="--text-column"):
        yield from unreadable()
        yield placed
    yield from unreadable()
