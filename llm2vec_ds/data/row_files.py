"""Reads one file of rows, in any of FORMATS, plain or compressed. Gives each row's columns and its place.

A text file is UTF-8, or UTF-16 or UTF-32 with a byte order mark. A row that breaks its format goes to
`BadRows`: it is an error that names its line, or it is left out and counted.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import logging
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import parse_json

log = logging.getLogger(__name__)

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = tuple(OPENERS)
DELIMITERS = ",;\t|"
MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
LONGEST_LINE_BYTES = 2**26
SHOWN = 3
"""The log names at most this many bad rows."""

Row = tuple[dict[str, Any], str]
"""A row's columns, and its place for error messages."""


@dataclass
class BadRows:
    """Handles bad rows: `raise` raises an error, `skip` leaves them out and counts them.

    Attributes:
        quiet: the log does not name them.
    """

    policy: str = "raise"
    counts: Counter[str] = field(default_factory=Counter)
    quiet: bool = False

    def found(self, message: str) -> None:
        """Handles one bad row.

        Raises:
            UserError: the policy is `raise`.
        """
        if self.policy == "raise":
            raise UserError(message)
        self.counts["bad rows"] += 1
        if self.counts["bad rows"] <= SHOWN and not self.quiet:
            log.warning("left out: %s", message)


def format_or_none(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def format_of(file: Path) -> str:
    """Returns the file's format.

    Raises:
        UserError: it is none of FORMATS.
    """
    found = format_or_none(file)
    if found is None:
        raise UserError(
            f"data file {file}: unknown format {''.join(file.suffixes[-2:])!r}: "
            f"use one of {', '.join(FORMATS)}, plain or with {', '.join(COMPRESSIONS)}"
        )
    return found


def rows_of(file: Path, columns: Sequence[str], bad: BadRows, optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yields the rows in order, with `columns` and, if present, `optional`.

    A line of a `.txt` file fills the first of `columns`. A JSON list of at least two items fills `columns`,
    and its other items fill the first of `optional`.

    Raises:
        UserError: the file cannot be read, or a row is bad.
    """
    readers = {
        ".txt": _text_lines,
        ".jsonl": _json_lines,
        ".json": _json_file,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet_rows,
    }
    with _reading(file):
        yield from readers[format_of(file)](file, columns, bad, optional)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns errors of reading or decoding a file into UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    except UnicodeError as error:
        words = " ".join(str(error).split())[:120]
        encoding = getattr(error, "encoding", "utf-8").upper()
        fix = "convert it, such as by iconv -f latin1 -t utf8 FILE > NEW"
        if "8" not in encoding:  # a byte order mark said so
            fix = "its byte order mark names this encoding: write the file again"
        raise UserError(f"{file} is not text in {encoding} ({words}): {fix}") from None


def _open(file: Path) -> IO[bytes]:
    opened: IO[bytes] = OPENERS.get(file.suffix.lower(), open)(file, "rb")
    return opened


def encoding_of(start: bytes) -> str:
    """Returns the encoding from the byte order mark at the start of a file. Without one it is UTF-8."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8-sig")


@contextmanager
def opened_text(file: Path) -> Iterator[io.TextIOWrapper]:
    """Opens a text file, compressed or not, in UTF-8 or as its byte order mark says.

    Raises:
        UserError: it cannot be opened, or reading fails later.
    """
    with _reading(file), _as_text(file, _open(file), None) as text:
        yield text


def _as_text(file: Path, opened: IO[bytes], newline: str | None) -> io.TextIOWrapper:
    with _open(file) as again:
        encoding = encoding_of(again.read(4))
    return io.TextIOWrapper(opened, encoding=encoding, newline=newline)


def _text_lines(file: Path, columns: Sequence[str], bad: BadRows, _: Sequence[str]) -> Iterator[Row]:
    """Yields the lines. A line that is binary or not UTF-8 is always left out and counted."""
    with _open(file) as opened:
        if encoding_of(opened.read(4)) != "utf-8-sig":
            opened.seek(0)
            for number, text in enumerate(_as_text(file, opened, "\n"), 1):
                yield {columns[0]: text.rstrip("\r\n")}, f"{file}, line {number}"
            return
        opened.seek(0)
        for number, line in enumerate(_bounded_lines(opened), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in line:
                bad.counts["binary"] += 1
                continue
            try:
                yield {columns[0]: line.decode("utf-8").rstrip("\r\n")}, f"{file}, line {number}"
            except UnicodeDecodeError:
                bad.counts["not UTF-8"] += 1


def _bounded_lines(opened: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines. One over LONGEST_LINE_BYTES is cut at spaces, so that no line fills the memory."""
    rest = b""
    while chunk := opened.readline(LONGEST_LINE_BYTES):
        line, rest = rest + chunk, b""
        if len(chunk) == LONGEST_LINE_BYTES and not chunk.endswith(b"\n"):
            cut = line.rfind(b" ") + 1 or len(line)
            line, rest = line[:cut], line[cut:]
        yield line
    if rest:
        yield rest


def _json_lines(file: Path, columns: Sequence[str], bad: BadRows, optional: Sequence[str]) -> Iterator[Row]:
    with _open(file) as opened:
        wide = encoding_of(opened.read(4)) != "utf-8-sig"
        opened.seek(0)
        lines: Any = _as_text(file, opened, "\n") if wide else opened
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                bad.found(f"{place}: not valid JSON: {error}")
                continue
            yield from _json_row(value, place, columns, bad, optional)


def _json_row(
    value: Any, place: str, columns: Sequence[str], bad: BadRows, optional: Sequence[str]
) -> Iterator[Row]:
    if isinstance(value, list) and len(columns) > 1 and len(value) >= len(columns):
        more = {name: value[len(columns) :] for name in optional[:1]}
        yield {**dict(zip(columns, value, strict=False)), **more}, place
    elif isinstance(value, dict):
        yield value, place
    else:
        bad.found(f"{place}: expected one JSON object per line")


def _json_file(file: Path, columns: Sequence[str], bad: BadRows, optional: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a JSON array. Also reads JSON lines that have the wrong file ending."""
    with _open(file) as opened:
        text = _as_text(file, opened, None).read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, columns, bad, optional)
        return
    try:
        values = parse_json(text)
    except ValueError as error:
        if text.lstrip().partition("\n")[0].rstrip().endswith("]"):  # one list per line
            yield from _json_lines(file, columns, bad, optional)
            return
        raise UserError(f"{file}: not valid JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield from _json_row(value, f"{file}, item {number}", columns, bad, optional)


def _table(file: Path, columns: Sequence[str], bad: BadRows, _: Sequence[str]) -> Iterator[Row]:
    rows = table_rows(file, bad)
    header, _line = next(rows, ([], 0))
    if twice := [name for name in columns if header.count(name) > 1]:
        raise UserError(f"{file} has the column {twice[0]!r} twice: rename one of them")
    for fields, line in rows:
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True)), f"{file}, line {line}"
            continue
        if len(fields) < len(header):
            remedy = "is the row cut, or does a text hold a line break without quotes?"
        elif format_of(file) == ".tsv":
            remedy = "does a text contain a tab?"
        else:
            remedy = "put texts with commas in quotes"
        n_fields = f"{len(fields)} field{'s' * (len(fields) != 1)}"
        bad.found(f"{file}, line {line}: {n_fields}, but the header has {len(header)}: {remedy}")


def table_rows(file: Path, bad: BadRows) -> Iterator[tuple[list[str], int]]:
    """Yields the fields of each row of a `.csv` or `.tsv` file, and the line where it ends.

    The header is the first row. Tabs separate the fields of a `.tsv` file. For a `.csv` file it is the
    delimiter that is most frequent in the first line. In a `.tsv` file a quotation mark is part of the text,
    unless it encloses a whole field.

    Raises:
        UserError: a quote is not closed, or a row is bad.
    """
    csv.field_size_limit(2**30)
    tabs = format_or_none(file) == ".tsv"
    with _reading(file), _open(file) as opened:
        lines = _as_text(file, opened, "")
        first = lines.readline()
        delimiter = "\t" if tabs else _delimiter(file, first)
        quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        reader = csv.reader(chain([first], lines), delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = f"{file}, after line {reader.line_num}: not a row of CSV: {error}"
                if "end of data" in str(error):
                    raise UserError(f"{message}: a quote is not closed") from None
                bad.found(message)
                continue
            if any("\0" in value for value in fields):
                bad.found(f"{file}, line {reader.line_num}: it contains a NUL byte")
            elif fields:
                yield [_unquoted(value) for value in fields] if tabs else fields, reader.line_num


def _delimiter(file: Path, header: str) -> str:
    outside = "".join(header.split('"')[::2])
    found = max(DELIMITERS, key=outside.count)
    if found != "," and outside.count(found):
        log.info("%s: fields are separated by %r", file, found)
        return found
    return ","


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else value


def _parquet_rows(file: Path, columns: Sequence[str], _: BadRows, optional: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            found = table.schema_arrow.names
            if not set(columns) <= set(found):
                yield dict.fromkeys(found), str(file)  # the caller's error lists these columns
                return
            more = [name for name in found if any(name == o or name.startswith(f"{o}_") for o in optional)]
            number = 0
            for batch in table.iter_batches(1024, columns=list(dict.fromkeys([*columns, *more]))):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}, row {number}"
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a Parquet file: {' '.join(str(error).split())[:160]}") from None
