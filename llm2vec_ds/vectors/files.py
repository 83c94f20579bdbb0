"""Vectors on disk: one file, or the shards in a folder. A note beside each file says what it holds.

vectors.npy            [rows, dimensions] float32, a row of NaN for a text without a vector. Or fewer bytes
                       (quantized.py), if the note says so
vectors.jsonl          one line per row: {"row": 0, "text": "…", "vector": […] or null}
vectors.parquet        the same as columns
<any of these>.json    the note: model, input, options, rows, dimensions
DIR/shard-00003-of-00016.npy      rows of one shard. The shards in order give all rows
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.reading import checked_json, explain, read_json
from llm2vec_ds.vectors.quantized import DTYPES, Stored, dequantize, stored_width

VECTOR_FORMATS = (".npy", ".jsonl", ".parquet")
ROWS_PER_BLOCK = 4096
ENCODE_AGAIN = "encode the texts again, with --overwrite"
Count = Annotated[int, Field(ge=0)]
_SHARD_NAME = re.compile(r"shard-(\d+)-of-(\d+)(\.[a-z]+)")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` parts. The index counts from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads `I/N`.

        Raises:
            UserError: it is not two whole numbers with 0 ≤ I < N.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"--shard {text!r} must be I/N with 0 ≤ I < N, such as 0/16")
        return cls(int(found[1]), int(found[2]))

    def rows(self, n_rows: int) -> tuple[int, int]:
        """Returns the first row of this part of `n_rows`, and one past the last.

        The sizes of parts differ by one row at most.
        """
        return n_rows * self.index // self.count, n_rows * (self.index + 1) // self.count

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"shard-{self.index:05}-of-{self.count:05}{suffix}"


@dataclass(frozen=True)
class VectorNote:
    """The note of a file of vectors.

    Attributes:
        first_row: the input's row of the file's first vector.
        n_rows: rows of the input.
        n_rows_here: rows of this file.
        input_key: changes if the input may have changed. None: an earlier version wrote the note.
        model_key: changes with the encoder's weights and settings. None: they were not on this machine, or an
            earlier version wrote the note.
    """

    key: str
    model: str
    input: str
    text_column: str
    instruction: str | None
    normalize: bool
    first_row: Count
    n_rows: Count
    n_rows_here: Count
    dimensions: Count
    llm2vec_ds_version: str
    stored: Stored = "float32"
    input_key: str | None = None
    model_key: str | None = None

    def write(self, file: Path) -> None:
        replace_json(note_of(file), asdict(self))

    @classmethod
    def read(cls, file: Path) -> VectorNote | None:
        """Reads the note of a file of vectors. None: there is no note.

        Raises:
            UserError: the note is damaged.
        """
        if not note_of(file).exists():
            return None
        return read_json(note_of(file), cls, ENCODE_AGAIN)


def note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def load_vectors(path: str | Path) -> np.ndarray:
    """Reads the vectors of a file or of a folder of shards, in the order of the input.

    One `.npy` file of float32 is memory-mapped. Several files are joined in memory. int8 and binary vectors
    become fp32 again. `vector_blocks` does the same block by block.

    Args:
        path: a `.npy`, `.jsonl` or `.parquet` file that `llm2vec-ds encode` wrote, or a folder of its shards.

    Returns:
        `[rows, dimensions]` fp32.

    Raises:
        UserError: as `vector_blocks`.
    """
    files = vector_files(path)
    if len(files) == 1 and files[0].suffix == ".npy":
        mapped, stored, _ = stored_rows(files[0])
        if stored == "float32":
            return mapped
    return np.concatenate(list(vector_blocks(path)))


def vector_blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Yields what `load_vectors` reads, a bounded number of rows at a time.

    Args:
        path: as for `load_vectors`.

    Yields:
        `[rows, dimensions]` fp32.

    Raises:
        UserError: there are no vectors, a file is damaged, shards are missing, or they come from different
            inputs, models or options.
    """
    for file in vector_files(path):
        yield from _read_blocks(file)


def vector_files(path: str | Path) -> list[Path]:
    """Returns the file, or a folder's shards in order. Checks that they are complete and of one kind.

    Raises:
        UserError: as `vector_blocks`.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix not in VECTOR_FORMATS:
            raise UserError(
                f"{path} holds no vectors: name a file in {', '.join(VECTOR_FORMATS)}, or a folder"
            )
        return [path]
    found = {
        file: match for file in sorted(path.glob("shard-*")) if (match := _SHARD_NAME.fullmatch(file.name))
    }
    if not found:
        raise UserError(f"{path} holds no vectors: write some with llm2vec-ds encode")
    kinds = {(int(match[2]), match[3]) for match in found.values()}
    if len(kinds) > 1:
        raise UserError(
            f"{path} holds shards of several encodings: keep those of one, or encode into another folder"
        )
    ((count, suffix),) = kinds
    files = [Shard(index, count).file(path, suffix) for index in range(count)]
    if missing := [str(i) for i, file in enumerate(files) if file not in found]:
        raise UserError(
            f"{path}: shard(s) {', '.join(missing[:10])} of {count} are missing: encode them first"
        )
    if len({_kind(file) for file in files}) > 1:
        raise UserError(f"{path}: its shards come from different models, inputs or options: encode it again")
    return files


def _kind(file: Path) -> tuple[Any, ...]:
    note = VectorNote.read(file)
    if note is None:
        raise UserError(f"{file} has no note {note_of(file).name}: encode it again")
    return note.key, note.n_rows, note.dimensions, note.stored


def _read_blocks(file: Path) -> Iterator[np.ndarray]:
    if file.suffix == ".npy":
        mapped, stored, dimensions = stored_rows(file)
        for start in range(0, max(1, len(mapped)), ROWS_PER_BLOCK):
            yield dequantize(mapped[start : start + ROWS_PER_BLOCK], stored, dimensions)
        return
    note = VectorNote.read(file)
    width = note.dimensions if note else None
    n_rows = 0
    for rows in read_rows(file):
        found = next((len(row["vector"]) for row in rows if row["vector"] is not None), 0)
        width = found if width is None else width
        missing = [np.nan] * width
        listed = [missing if row["vector"] is None else row["vector"] for row in rows]
        if any(len(vector) != width for vector in listed):
            raise _damaged(file, f"its vectors do not all have {width} dimensions")
        n_rows += len(rows)
        yield np.asarray(listed, dtype=np.float32).reshape(len(rows), width)
    _check_rows(file, note, n_rows)


def stored_rows(file: Path) -> tuple[np.ndarray, Stored, int]:
    """Returns the rows of a .npy file as they are stored (memory-mapped), their form, and their dimensions.

    Raises:
        UserError: the file is damaged, or its note says something else.
    """
    note = VectorNote.read(file)
    stored: Stored = note.stored if note else "float32"
    try:
        mapped: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(file, " ".join(str(error).split())[:160]) from None
    if not isinstance(mapped, np.ndarray) or mapped.dtype != DTYPES[stored] or mapped.ndim != 2:
        raise _damaged(file, f"it does not hold one {stored} vector per row")
    width = note.dimensions if note else int(mapped.shape[1])
    if mapped.shape[1] != stored_width(width, stored):
        raise _damaged(file, f"its vectors have {mapped.shape[1]} dimensions, but its note says {width}")
    _check_rows(file, note, len(mapped))
    return mapped, stored, width


def _check_rows(file: Path, note: VectorNote | None, n_rows: int) -> None:
    if note and n_rows != note.n_rows_here:
        raise _damaged(file, f"it has {n_rows} rows, but its note says {note.n_rows_here}")


def _damaged(file: Path, cause: str) -> UserError:
    return UserError(f"{file} is damaged ({cause}): {ENCODE_AGAIN}")


@dataclass(frozen=True)
class _Row:
    """A row of a .jsonl or .parquet file. `vector` is None for a text without a vector."""

    row: int
    text: str | None
    vector: list[float] | None


def read_rows(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields blocks of rows (`row`, `text`, `vector`) of a .jsonl or .parquet file.

    Raises:
        UserError: the file is damaged.
    """
    blocks = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    return ([vars(row) for row in block] for block in blocks)


def _parquet_rows(file: Path) -> Iterator[list[_Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows_of = TypeAdapter(list[_Row])
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_PER_BLOCK):
                yield rows_of.validate_python(batch.to_pylist())
    except ValidationError as error:
        raise _damaged(file, explain(error.errors()[0])) from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(file, " ".join(str(error).split())[:160]) from None


def _json_rows(file: Path) -> Iterator[list[_Row]]:
    with file.open("rb") as lines:
        block: list[_Row] = []
        for number, line in enumerate(lines, 1):
            try:
                block.append(checked_json(line, _Row))
            except ValueError as error:
                raise _damaged(file, f"line {number}: {error}") from None
            if len(block) == ROWS_PER_BLOCK:
                yield block
                block = []
        if block:
            yield block


def write_rows(
    file: Path, blocks: Iterator[tuple[int, list[str | None], np.ndarray]], dimensions: int
) -> None:
    """Writes a .jsonl or .parquet file from blocks of first row, texts and vectors. NaN becomes null."""
    write = _write_parquet if file.suffix == ".parquet" else _write_json_lines
    write(file, (_listed(*block) for block in blocks), dimensions)


def _listed(first_row: int, texts: list[str | None], vectors: np.ndarray) -> list[dict[str, Any]]:
    bad = np.isnan(vectors).any(axis=1)
    return [
        {"row": first_row + i, "text": text, "vector": None if bad[i] else vectors[i].tolist()}
        for i, text in enumerate(texts)
    ]


def _write_json_lines(file: Path, blocks: Iterator[list[dict[str, Any]]], _: int) -> None:
    with file.open("w", encoding="utf-8") as opened:
        for rows in blocks:
            opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(file: Path, blocks: Iterator[list[dict[str, Any]]], dimensions: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), dimensions)
    schema = pa.schema([("row", pa.int64()), ("text", pa.string()), ("vector", vector)])
    with pq.ParquetWriter(file, schema) as writer:
        for rows in blocks:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
