"""One text a row, whatever the row holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llm2vec_ds.data.sources import find_source
from llm2vec_ds.data.text_rows import TextRows, count_rows

LINES = [b"\0", b"one", b"", b"\xff", b"two", b"PK\0", b"\xfe\xff"]
ROWS = [None, "one", "", None, "two", None, None]


@pytest.mark.parametrize(("start", "stop"), itertools.combinations(range(8), 2))
def test_unreadable_lines_keep_their_place(start: int, stop: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n".join(LINES))
    source = find_source(str(tmp_path / "a.txt"))
    assert count_rows(source, "text") == len(ROWS)
    rows = TextRows(source, "text", start, stop)
    assert list(rows) == list(rows) == ROWS[start:stop]
    assert len(rows) == stop - start
