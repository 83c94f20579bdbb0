"""Files of texts, or a hub data set → a stream of strings that is never held as a whole.

What becomes of a bad line of a `.txt` file: blank lines, lines with NUL bytes (binary) and lines that are
not UTF-8 are left out and counted. A text over `LONGEST_TEXT_CHARACTERS` comes in pieces of that size, cut
at a blank. Duplicates stay. In the structured formats a row that cannot be read is an error with its place.
"""

from __future__ import annotations

import io
import logging
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from llm2vec_ds.data.prompts import is_text
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import PairsConfig
from llm2vec_ds.storage.reading import csv_rows, parse_json

log = logging.getLogger(__name__)

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz")
LONGEST_TEXT_CHARACTERS = 2**20
LONGEST_LINE_BYTES = 2**26
HUB_PREFIX = "hub:"
PAIR_KEYS = tuple(f"data.pairs.{name}_column" for name in ("query", "positive", "negative"))

Row = tuple[dict[str, Any], str]
"""A row's columns, and where it stands, for error messages."""


@dataclass(frozen=True)
class Source:
    """Where texts come from: files of one format, or one hub data set (`hub:name[:config]@split`)."""

    files: tuple[Path, ...] = ()
    hub: str | None = None

    def identity(self) -> list[Any]:
        """What changes when the texts may have changed: path, size and time of each file."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return [self.hub, *([path, stat.st_size, stat.st_mtime_ns] for path, stat in stats)]

    def __str__(self) -> str:
        shown = [str(file) for file in self.files[:3]]
        return self.hub or ", ".join(shown) + (" …" if len(self.files) > 3 else "")


def find_source(path: str | Sequence[str], key: str = "data.path") -> Source:
    """What a recipe's `data.path` (or another `key`) names: a file, several, a folder, or a hub data set.

    Raises:
        UserError: a file is missing, or they are not all of one known format.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if len(paths) == 1 and paths[0].startswith(HUB_PREFIX):
        return Source(hub=paths[0])
    files = [file for name in paths for file in _files(Path(name).expanduser())]
    if not files:
        raise UserError(f"{key} {path!r} names no file of a known format ({', '.join(FORMATS)})")
    formats = sorted({_format(file) for file in files})
    if len(formats) > 1:
        raise UserError(f"data files of several formats ({', '.join(formats)}): use one format a recipe")
    return Source(tuple(files))


def stream_texts(
    source: Source, text_column: str, counts: Counter[str], *, whole: bool, key: str = "data.text_column"
) -> Iterator[str]:
    """Texts in order, blank ones included; adds to `counts` what was left out and why.

    Args:
        whole: False keeps only the first piece of an oversized text (enough where texts are truncated).
        key: where the user names the column.

    Raises:
        UserError: the column is missing or a row cannot be read.
    """
    for row, place in _rows(source, [text_column], counts):
        text = _text(_value(row, text_column, place, key), text_column, place)
        if not is_text(text):
            counts["not UTF-8"] += 1
            continue
        if len(text) <= LONGEST_TEXT_CHARACTERS:
            yield text
            continue
        counts["oversized"] += 1
        yield from _pieces(text) if whole else [next(_pieces(text))]


def stream_pairs(
    source: Source, pairs: PairsConfig, counts: Counter[str], keys: Sequence[str] = PAIR_KEYS
) -> Iterator[tuple[str, ...]]:
    """Query, positive and up to `max_negatives` hard negatives of each example, in order.

    A negative column may hold one text or a list of them; blank negatives vanish. A row without the column
    has none.

    Args:
        keys: where the user names the columns of query, positive and negative.

    Raises:
        UserError: as `stream_texts`; the source is plain text, which has no columns; or the recipe names a
            negative column that no row has.
    """
    if any(_format(file) == ".txt" for file in source.files):
        raise UserError(f"{source}: pairs need columns: use .jsonl, .csv or .parquet")
    columns = [pairs.query_column, pairs.positive_column]
    optional = [pairs.negative_column] if pairs.max_negatives else []
    n_rows = n_with_negatives = 0
    for row, place in _rows(source, columns, counts, optional):
        query, positive = (
            _value(row, column, place, key) for column, key in zip(columns, keys, strict=False)
        )
        n_rows += 1
        n_with_negatives += pairs.negative_column in row
        value = row.get(pairs.negative_column) if optional else None
        listed = value if isinstance(value, list) else [value]
        negatives = [_text(negative, pairs.negative_column, place) for negative in listed]
        given = [text for text in negatives if text.strip()][: pairs.max_negatives]
        texts = (_text(query, columns[0], place), _text(positive, columns[1], place), *given)
        if not all(map(is_text, texts)):
            counts["not UTF-8"] += 1
            continue
        yield tuple(text[:LONGEST_TEXT_CHARACTERS] for text in texts)
    if not optional or not n_rows or n_with_negatives:
        return
    if pairs.negative_column != PairsConfig().negative_column:
        raise UserError(
            f"{source}: no row has the column {pairs.negative_column!r} of data.pairs.negative_column: name "
            "another, or set data.pairs.max_negatives=0"
        )
    log.info("%s: no column %r, so no hard negatives", source, pairs.negative_column)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.is_file() and _format_or_none(f) and f.name[0] != ".")
    if not path.is_file():
        raise UserError(f"data file {path} not found (relative paths start at {Path.cwd()})")
    return [path]


def _format_or_none(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _format(file: Path) -> str:
    found = _format_or_none(file)
    if found is None:
        raise UserError(
            f"data file {file}: unknown format {''.join(file.suffixes[-2:])!r}, "
            f"use one of {', '.join(FORMATS)}, plain or with {', '.join(COMPRESSIONS)}"
        )
    return found


def _rows(
    source: Source, columns: Sequence[str], counts: Counter[str], optional: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows in order, of which `columns` and, where they are there, `optional` are read; a line of a `.txt`
    file is the first of `columns`."""
    if source.hub:
        yield from _hub(source.hub)
        return
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    for file in source.files:
        try:
            yield from readers[_format(file)](file, columns, counts, optional)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None


def _open(file: Path) -> IO[bytes]:
    import fsspec

    opened: IO[bytes] = fsspec.open(str(file), "rb", compression="infer").open()
    return opened


def _text_lines(file: Path, columns: Sequence[str], counts: Counter[str], _: Sequence[str]) -> Iterator[Row]:
    with _open(file) as opened:
        for number, line in enumerate(_bounded_lines(opened)):
            if number == 0:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{file} is UTF-16: convert it first, iconv -f UTF-16 -t UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in line:
                counts["binary"] += 1
                continue
            try:
                yield {columns[0]: line.decode("utf-8").rstrip("\r\n")}, f"{file}, line {number + 1}"
            except UnicodeDecodeError:
                counts["not UTF-8"] += 1


def _bounded_lines(opened: IO[bytes]) -> Iterator[bytes]:
    """Lines; one over LONGEST_LINE_BYTES comes in parts cut at blanks, so that no line fills the memory."""
    rest = b""
    while chunk := opened.readline(LONGEST_LINE_BYTES):
        line, rest = rest + chunk, b""
        if len(chunk) == LONGEST_LINE_BYTES and not chunk.endswith(b"\n"):
            cut = line.rfind(b" ") + 1 or len(line)
            line, rest = line[:cut], line[cut:]
        yield line
    if rest:
        yield rest


def _json_lines(file: Path, *_: Any) -> Iterator[Row]:
    with _open(file) as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected a JSON object, one a line")
            yield row, f"{file}, line {number}"


def _csv_rows(file: Path, *_: Any) -> Iterator[Row]:
    with _open(file) as opened:
        try:
            for row, line in csv_rows(io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")):
                yield dict(row), f"{file}, line {line}"
        except ValueError as error:
            raise UserError(f"{file}, {error}") from None


def _parquet_rows(
    file: Path, columns: Sequence[str], _: Counter[str], optional: Sequence[str]
) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            found = table.schema_arrow.names
            if not set(columns) <= set(found):
                yield dict.fromkeys(found), str(file)  # whoever looks for a missing column names those there
                return
            read = [*columns, *(name for name in optional if name in found)]
            for batch in table.iter_batches(1024, columns=read):
                for row in batch.to_pylist():
                    yield row, str(file)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a Parquet file: {' '.join(str(error).split())[:160]}") from None


def _value(row: dict[str, Any], column: str, place: str, key: str) -> Any:
    if column not in row:
        found = ", ".join(str(name) for name in row)
        raise UserError(f"{place}: no column {column!r}; set {key} to one of: {found}")
    return row[column]


def _text(value: Any, column: str, place: str) -> str:
    """A missing value (null, NaN) is the empty text, a number its digits.

    Raises:
        UserError: a list, an object or bytes, which would be trained as Python writes them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float | Decimal | date):
        names: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}
        kind = names.get(type(value), type(value).__name__)
        raise UserError(f"{place}: column {column!r} holds {kind}, no text: write one text in each row")
    return str(value)


def _hub(name: str) -> Iterator[Row]:
    """`hub:owner/name`, `hub:owner/name:config`, each with `@split` (default train), streamed."""
    import datasets

    address, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    owner, _, config = address.partition(":")
    try:
        rows = datasets.load_dataset(owner, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield row, f"{name}, row {number}"
    except Exception as error:  # whatever the hub's client raises, the user sees one line
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"hub data set {name} cannot be streamed ({cause}): check name, split and network"
        ) from None


def _pieces(text: str) -> Iterator[str]:
    """Parts of at most LONGEST_TEXT_CHARACTERS characters, cut at the last blank where there is one."""
    start = 0
    while start < len(text):
        stop = start + LONGEST_TEXT_CHARACTERS
        if stop < len(text):
            blank = text.rfind(" ", start, stop)
            stop = blank + 1 if blank > start else stop
        yield text[start:stop]
        start = stop
