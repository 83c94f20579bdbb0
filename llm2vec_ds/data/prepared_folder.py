"""A folder of prepared texts on disk: its manifest, its Arrow files, and the check for damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import DataConfig
from llm2vec_ds.storage.cache_folder import cache_root
from llm2vec_ds.storage.fingerprint import files_sha256
from llm2vec_ds.storage.reading import read_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
"""Version of the folder's format, and of the way texts become tokens."""

QUERY, POSITIVE, NEGATIVE = 0, 1, 2
"""Role of a row. A query begins an example. A text that is not part of a pair counts as a query."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared texts holds.

    Attributes:
        fingerprint: SHA-256 over the hashes of the parts.
        counts: rows, tokens, and what was left out and why.
        largest_id: the largest token id. None: version 0.1 wrote the folder and did not store it.
    """

    fingerprint: str
    source: str
    parts: list[str]
    counts: dict[str, int]
    largest_id: int | None = None


def prepared_root(data: DataConfig) -> Path:
    """Returns the parent of the folders that are prepared for these data."""
    return Path(data.prepared_dir) if data.prepared_dir else cache_root() / "prepared"


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder that `prepare` made. Opens no part.

    Raises:
        UserError: it is damaged.
    """
    return read_json(folder / MANIFEST, Manifest, f"remove {folder}, then prepare again")


def check_bad_rows(folder: Path, source: str, policy: str) -> None:
    """Refuses texts whose bad rows an earlier run left out, if the policy is `raise`.

    Raises:
        UserError: the folder lacks rows that could not be read.
    """
    n_bad = read_manifest(folder).counts.get("bad rows", 0)
    if n_bad and policy == "raise":
        raise UserError(
            f"{source} has {n_bad} row(s) that cannot be read, which an earlier run left out: correct them, "
            "or leave them out with data.bad_rows=skip"
        )


def damage_of(folder: Path) -> str | None:
    """Returns what is wrong with a folder that `prepare` made, or None. Reads all of it."""
    try:
        manifest = read_manifest(folder)
        if fingerprint(folder, manifest.parts) != manifest.fingerprint:
            return "its content has changed"
    except (UserError, OSError) as error:
        return str(error)
    return None


def fingerprint(folder: Path, parts: list[str]) -> str:
    # A large folder takes a while, so a bar appears after two seconds.
    named = tqdm(parts, desc="check prepared texts", unit="part", disable=None, delay=2)
    return files_sha256(folder / name for name in named)


def batches(folder: Path, parts: list[str]) -> Iterator[Any]:
    """Yields the record batches of all parts.

    The files are not memory-mapped, because mapped pages of a large source count as this process's memory.
    """
    import pyarrow as pa

    for name in parts:
        with pa.OSFile(str(folder / name)) as part, pa.ipc.open_stream(part) as stream:
            yield from stream


def largest_id_in(folder: Path) -> int:
    """Returns the largest token id in a folder that `prepare` made."""
    manifest = read_manifest(folder)
    return largest_id(folder, manifest.parts) if manifest.largest_id is None else manifest.largest_id


def largest_id(folder: Path, parts: list[str]) -> int:
    return max(batch.column("input_ids").values.to_numpy().max() for batch in batches(folder, parts)).item()


def n_duplicates(folder: Path, parts: list[str], n_rows: int) -> int:
    """Counts texts that equal an earlier row. Of pairs, it counts only queries.

    It sorts hashes, which takes 9 bytes per row. np.unique would take about 60 bytes per row.
    """
    hashes = np.empty(n_rows, dtype=np.int64)
    end = 0
    for batch in batches(folder, parts):
        own = batch.column("text_hash").to_numpy()[batch.column("role").to_numpy() == QUERY]
        hashes[end : end + len(own)] = own
        end += len(own)
    hashes = hashes[:end]
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))
