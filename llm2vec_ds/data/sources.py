"""Reads texts from files or from a hub data set, as a stream that is never in memory as a whole.

Of a `.txt` file, blank lines, lines with NUL bytes (binary) and lines that are not UTF-8 are left out and
counted. In the other formats, a row that cannot be read is an error that names its place, or it is left out
and counted (`BadRows`). A text over `LONGEST_TEXT_CHARACTERS` is cut at a space into pieces of that size.
Duplicates stay.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from llm2vec_ds.data.prompts import is_text
from llm2vec_ds.data.row_files import FORMATS, BadRows, Row, format_of, format_or_none, rows_of
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import PairsConfig
from llm2vec_ds.storage.fingerprint import stat_of

log = logging.getLogger(__name__)

LONGEST_TEXT_CHARACTERS = 2**20
HUB_PREFIX = "hub:"
LIKE_A_HUB_NAME = r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?"
PAIR_KEYS = tuple(f"data.pairs.{name}_column" for name in ("query", "positive", "negative"))


@dataclass(frozen=True)
class Source:
    """Where texts come from: files of one format, or one hub data set (`hub:name[:config]@split`)."""

    files: tuple[Path, ...] = ()
    hub: str | None = None

    def identity(self) -> list[Any]:
        """Returns path, size and time of each file. This changes if the texts may have changed."""
        return [self.hub, *(stat_of(file, str(file.resolve())) for file in self.files)]

    def __str__(self) -> str:
        shown = [str(file) for file in self.files[:3]]
        return self.hub or ", ".join(shown) + (" …" if len(self.files) > 3 else "")


def find_source(path: str | Sequence[str], key: str = "data.path") -> Source:
    """Finds what a recipe's `data.path` (or another `key`) names: files, a folder, or a hub data set.

    Raises:
        UserError: a file is missing, the files are not all in one known format, or a hub data set is combined
            with others.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if len(paths) == 1 and paths[0].startswith(HUB_PREFIX):
        return Source(hub=paths[0])
    if beside := [name for name in paths if name.startswith(HUB_PREFIX)]:
        raise UserError(
            f"{key}: {beside[0]} cannot be combined with others: give one data set of the hub, or files"
        )
    files = [file for name in paths for file in _files(Path(name).expanduser())]
    if not files:
        raise UserError(f"{key} {path!r} names no file of a known format ({', '.join(FORMATS)})")
    formats = sorted({format_of(file) for file in files})
    if len(formats) > 1:
        raise UserError(f"data files have several formats ({', '.join(formats)}): use one format")
    return Source(tuple(files))


LONGEST_NAME = 40
"""A longer name of a column is cut in messages. It is probably a text."""


def stream_texts(
    source: Source,
    text_column: str,
    counts: Counter[str],
    *,
    whole: bool,
    key: str = "data.text_column",
    bad_rows: str = "raise",
) -> Iterator[str]:
    """Yields the texts in order, also blank ones. Adds to `counts` what was left out and why.

    Args:
        whole: False keeps only the first piece of an oversized text. That is enough if texts are truncated.
        key: where the user sets the column.
        bad_rows: `raise` an error, or `skip` and count them.

    Raises:
        UserError: the column is missing or a row cannot be read.
    """
    bad = BadRows(bad_rows, counts)
    return (text for text, _ in placed_texts(source, text_column, bad, whole=whole, key=key))


def placed_texts(
    source: Source, text_column: str, bad: BadRows, *, whole: bool, key: str
) -> Iterator[tuple[str, str]]:
    """Yields what `stream_texts` yields, each text with its place for messages."""
    for row, place in source_rows(source, [text_column], bad):
        try:
            text = as_text(value_of(row, text_column, place, key), text_column, place)
        except UserError as error:
            bad.found(str(error))
            continue
        if not is_text(text):
            bad.counts["not UTF-8"] += 1
            continue
        if len(text) <= LONGEST_TEXT_CHARACTERS:
            yield text, place
            continue
        bad.counts["oversized"] += 1
        for piece in _pieces(text) if whole else [next(_pieces(text))]:
            yield piece, place


def stream_pairs(
    source: Source,
    pairs: PairsConfig,
    counts: Counter[str],
    keys: Sequence[str] = PAIR_KEYS,
    bad_rows: str = "raise",
) -> Iterator[tuple[str, ...]]:
    """Yields query, positive and up to `max_negatives` hard negatives of each example, in order.

    The positive column holds one text or a list of texts. Each makes an example. The negative column holds
    one text or a list, or there are columns `negative_1`, `negative_2` … A list may hold texts with scores,
    `[text, 0.9]`. Blank texts in lists are left out. A row without a negative column has no hard negatives.

    Args:
        keys: where the user sets the columns of query, positive and negative. Empty: nowhere. Without a key
            for negatives, the log does not say that there are none.

    Raises:
        UserError: as `stream_texts`. Or the source is plain text, which has no columns. Or the recipe names a
            negative column that no row has.
    """
    if any(format_of(file) == ".txt" for file in source.files):
        raise UserError(f"{source}: pairs need columns: use .jsonl, .json, .csv, .tsv or .parquet")
    columns = [pairs.query_column, pairs.positive_column]
    optional = [pairs.negative_column] if pairs.max_negatives else []
    bad = BadRows(bad_rows, counts)
    n_rows = n_with_negatives = 0
    for row, place in source_rows(source, columns, bad, optional):
        try:
            query, positive = (
                value_of(row, column, place, key) for column, key in zip(columns, keys, strict=False)
            )
            query = as_text(query, columns[0], place)
            positives = _texts(positive, columns[1], place)
            named = _negative_columns(row, pairs.negative_column) if optional else []
            negatives = [text for name in named for text in _texts(row[name], name, place) if text.strip()]
        except UserError as error:
            bad.found(str(error))
            continue
        n_rows += 1
        n_with_negatives += bool(named)
        for positive in positives:
            texts = (query, positive, *negatives[: pairs.max_negatives])
            if not all(map(is_text, texts)):
                counts["not UTF-8"] += 1
                continue
            yield tuple(text[:LONGEST_TEXT_CHARACTERS] for text in texts)
    if not optional or not n_rows or n_with_negatives:
        return
    if pairs.negative_column != PairsConfig().negative_column:
        raise UserError(
            f"{source}: no row has the column {pairs.negative_column!r}: change data.pairs.negative_column, "
            "or set data.pairs.max_negatives=0"
        )
    if any(keys[2:]):
        log.info("%s: no column %r, so there are no hard negatives", source, pairs.negative_column)


def _negative_columns(row: dict[str, Any], column: str) -> list[str]:
    """Returns the column itself, or the numbered columns `column_1`, `column_2` …"""
    if column in row:
        return [column]
    numbered = {
        int(found[1]): name for name in row if (found := re.fullmatch(rf"{re.escape(column)}_(\d+)", name))
    }
    return [numbered[number] for number in sorted(numbered)]


def _texts(value: Any, column: str, place: str) -> list[str]:
    """Returns the text, or the texts of a list without blank ones. If all are blank, one blank text."""
    if not isinstance(value, list):
        return [as_text(value, column, place)]
    scored = (_without_score(item) for item in value)
    return [text for item in scored if (text := as_text(item, column, place)).strip()] or [""]


def _without_score(item: Any) -> Any:
    """Returns the text of `[text, score]`, or the item itself."""
    has_score = isinstance(item, list) and len(item) == 2 and isinstance(item[1], int | float)
    return item[0] if has_score else item


def _files(path: Path) -> list[Path]:
    """Returns the file, or the files of a folder in a known format. The log names the files left out."""
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise UserError(
                f"data file {path} is a pipe or a device: write it to a file first. "
                "`encode` reads standard input with --input -"
            )
        if not path.is_file():
            hint = ""
            if re.fullmatch(LIKE_A_HUB_NAME, str(path)) and format_or_none(path) is None:
                hint = f": for a data set of the hub write {HUB_PREFIX}{path}"
            raise UserError(f"data file {path} not found (relative paths start at {Path.cwd()}){hint}")
        return [path]
    taken: list[Path] = []
    left_out: list[str] = []
    seen: set[Path] = set()
    for where, folders, names in os.walk(path, followlinks=True):
        folder = Path(where)
        if (real := folder.resolve()) in seen:  # a link to a folder that was already read
            left_out.append(f"{folder}/ (already read)")
            folders.clear()
            continue
        seen.add(real)
        left_out += [f"{folder / name}/" for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (folder / name for name in names):
            known = not file.name.startswith(".") and format_or_none(file) is not None and file.is_file()
            if known:
                taken.append(file)
            else:
                left_out.append(str(file))
    if left_out:
        shown = ", ".join(str(place) for place in left_out[:5]) + (", …" if len(left_out) > 5 else "")
        log.info("%s: %s left out: %s", path, len(left_out), shown)
    return sorted(taken)


def source_rows(
    source: Source, columns: Sequence[str], bad: BadRows, optional: Sequence[str] = ()
) -> Iterator[Row]:
    """Yields the rows of all files, or of the hub data set, as `rows_of` does."""
    if source.hub:
        yield from _hub(source.hub)
        return
    for file in source.files:
        yield from rows_of(file, columns, bad, optional)


def value_of(row: dict[str, Any], column: str, place: str, key: str) -> Any:
    if column not in row:
        names = [str(name) for name in row]
        shown = (name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names)
        found = ", ".join(repr(name) if name != name.strip() else name for name in shown)
        fix = f"set {key} to one of" if key else "give this name to one of"
        header = "; is the header line missing?" if max(map(len, names), default=0) > LONGEST_NAME else ""
        raise UserError(f"{place}: no column {column!r}: {fix} {found}{header}")
    return row[column]


def as_text(value: Any, column: str, place: str) -> str:
    """Returns the value as a text. A missing value (null, NaN) becomes empty, a number becomes its digits.

    Raises:
        UserError: it is a list, an object, bytes or a boolean. Training should not see Python's form of them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal | date):
        names: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes", bool: "true or false"}
        kind = names.get(type(value), type(value).__name__)
        raise UserError(f"{place}: column {column!r} holds {kind}, not a text: write one text in each row")
    return str(value)


def _hub(name: str) -> Iterator[Row]:
    """Streams the rows of `hub:owner/name[:config][@split]`. The default split is train."""
    import datasets

    address, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    owner, _, config = address.partition(":")
    try:
        rows = datasets.load_dataset(owner, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield row, f"{name}, row {number}"
    except Exception as error:  # the hub's client raises many types, and the user should see one line
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"hub data set {name} cannot be read ({cause}): check its name, the split and the network"
        ) from None


def _pieces(text: str) -> Iterator[str]:
    """Yields pieces of at most LONGEST_TEXT_CHARACTERS characters, cut at the last space if there is one."""
    start = 0
    while start < len(text):
        stop = start + LONGEST_TEXT_CHARACTERS
        if stop < len(text):
            blank = text.rfind(" ", start, stop)
            stop = blank + 1 if blank > start else stop
        yield text[start:stop]
        start = stop
