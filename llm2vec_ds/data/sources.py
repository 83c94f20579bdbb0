"""Files of texts → a stream of strings, read by `datasets` and never held as a whole."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm2vec_ds.errors import UserError

BUILDER_OF_SUFFIX = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def source_files(path: str | Sequence[str]) -> list[Path]:
    """The files that a recipe names, in its order.

    Raises:
        UserError: a file is missing, or they are not all of one known format.
    """
    files = [Path(p) for p in ([path] if isinstance(path, str) else path)]
    if not files:
        raise UserError("data.path names no file")
    for file in files:
        if not file.is_file():
            raise UserError(f"data file {file} not found (relative paths start at {Path.cwd()})")
        if file.suffix not in BUILDER_OF_SUFFIX:
            known = ", ".join(BUILDER_OF_SUFFIX)
            raise UserError(f"data file {file}: unknown format {file.suffix!r}, use one of {known}")
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise UserError(f"data files of several formats ({', '.join(suffixes)}): use one format a recipe")
    return files


def stream_texts(files: Sequence[Path], text_column: str) -> Iterator[str]:
    """Texts in file order; .txt gives its lines.

    Raises:
        UserError: the column is missing or a file cannot be read as its format.
    """
    import datasets

    builder = BUILDER_OF_SUFFIX[files[0].suffix]
    column = "text" if builder == "text" else text_column
    patterns = [glob.escape(str(file.resolve())) for file in files]
    try:
        rows = datasets.load_dataset(builder, data_files=patterns, split="train", streaming=True)
        for row in rows:
            if column not in row:
                found = ", ".join(row)
                raise UserError(f"{files[0]}: no column {column!r}; set data.text_column to one of: {found}")
            yield "" if row[column] is None else str(row[column])
    except (UnicodeDecodeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{', '.join(map(str, files))}: not readable as {builder}: {reason}") from None
