"""Vectors on disk: one file, or the shards of a folder, each with a note beside it that says what it holds.

vectors.npy            [rows, dimensions] float32; NaN rows stand for texts without a vector
vectors.jsonl          a line a row: {"row": 0, "text": "…", "vector": […] or null}
vectors.parquet        the same as columns
<any of these>.json    the note: model, input, options, rows, dimensions
DIR/shard-00003-of-00016.npy      rows of one shard; shards follow one another
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.errors import UserError

VECTOR_FORMATS = (".npy", ".jsonl", ".parquet")
ROWS_A_BLOCK = 4096
_SHARD_NAME = re.compile(r"shard-(\d+)-of-(\d+)(\.[a-z]+)")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `I/N`.

        Raises:
            UserError: not two whole numbers with 0 ≤ I < N.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"--shard {text!r} must be I/N with 0 ≤ I < N, such as 0/16")
        return cls(int(found[1]), int(found[2]))

    def rows(self, n_rows: int) -> tuple[int, int]:
        """First row, and one past the last, of this part of `n_rows`; parts differ by one row at most."""
        return n_rows * self.index // self.count, n_rows * (self.index + 1) // self.count

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"shard-{self.index:05}-of-{self.count:05}{suffix}"


@dataclass(frozen=True)
class VectorNote:
    """What a file of vectors holds. `first_row`: its place among the input's `n_rows` rows."""

    key: str
    model: str
    input: str
    text_column: str
    instruction: str | None
    normalize: bool
    first_row: int
    n_rows: int
    n_rows_here: int
    dimensions: int
    llm2vec_ds_version: str

    def write(self, file: Path) -> None:
        note_of(file).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> VectorNote | None:
        """None: there is no note, or none of this kind."""
        try:
            return cls(**json.loads(note_of(file).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def load_vectors(path: str | Path) -> np.ndarray:
    """Vectors of a file or of a folder of shards, `[rows, dimensions]` fp32 in the order of the input.

    One `.npy` file comes memory-mapped; several parts are joined in memory (`vector_blocks` avoids that).

    Raises:
        UserError: as `vector_blocks`.
    """
    files = vector_files(path)
    if len(files) == 1 and files[0].suffix == ".npy":
        mapped: np.ndarray = np.load(files[0], mmap_mode="r")
        return mapped
    return np.concatenate(list(vector_blocks(path)))


def vector_blocks(path: str | Path) -> Iterator[np.ndarray]:
    """The same a bounded number of rows at a time.

    Raises:
        UserError: nothing there, shards are missing, or they come from different inputs, models or options.
    """
    for file in vector_files(path):
        yield from _read_blocks(file)


def vector_files(path: str | Path) -> list[Path]:
    """The file, or a folder's shards in order, complete and of one kind.

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
            f"{path} holds shards of several encodings: keep those of one, or encode into another"
        )
    ((count, suffix),) = kinds
    files = [Shard(index, count).file(path, suffix) for index in range(count)]
    if missing := [str(i) for i, file in enumerate(files) if file not in found]:
        raise UserError(
            f"{path}: shard(s) {', '.join(missing[:10])} of {count} are missing: encode them first"
        )
    if len({_kind(file) for file in files}) > 1:
        raise UserError(f"{path}: its shards come from different models, inputs or options: encode it anew")
    return files


def _kind(file: Path) -> tuple[Any, ...]:
    note = VectorNote.read(file)
    if note is None:
        raise UserError(f"{file} has no note {note_of(file).name}: encode it anew")
    return note.key, note.n_rows, note.dimensions


def _read_blocks(file: Path) -> Iterator[np.ndarray]:
    if file.suffix == ".npy":
        mapped = np.load(file, mmap_mode="r")
        yield from (mapped[i : i + ROWS_A_BLOCK] for i in range(0, max(1, len(mapped)), ROWS_A_BLOCK))
        return
    note = VectorNote.read(file)
    missing = [np.nan] * (note.dimensions if note else 0)
    for rows in read_rows(file):
        listed = [missing if row["vector"] is None else row["vector"] for row in rows]
        yield np.asarray(listed, dtype=np.float32).reshape(len(rows), -1)


def read_rows(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Blocks of rows (`row`, `text`, `vector`) of a .jsonl or .parquet file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            yield from (batch.to_pylist() for batch in table.iter_batches(ROWS_A_BLOCK))
        return
    with file.open(encoding="utf-8") as lines:
        block: list[dict[str, Any]] = []
        for line in lines:
            block.append(json.loads(line))
            if len(block) == ROWS_A_BLOCK:
                yield block
                block = []
        if block:
            yield block


def write_rows(
    file: Path, blocks: Iterator[tuple[int, list[str | None], np.ndarray]], dimensions: int
) -> None:
    """A .jsonl or .parquet file of blocks of first row, texts and vectors; NaN vectors become null."""
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
