"""Keys of stored results and hashes of files. They are equal for equal contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY_CHARACTERS = 24


def key_of(*parts: Any, version: int) -> str:
    """Returns the key of a stored result. It is the same for the same parts and version.

    Args:
        parts: what the result depends on. JSON must be able to hold them.
        version: version of the format and of the computation. Raise it when either changes. Keys of version 1
            do not contain it, because such keys existed before versions did.
    """
    digest = json_sha256(list(parts))[:KEY_CHARACTERS]
    return digest if version == 1 else f"v{version}-{digest}"


def json_sha256(value: Any) -> str:
    """Returns the SHA-256 of a value that JSON can hold. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """Returns one SHA-256 over the contents of several files, in order. Their names do not matter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def stat_of(file: Path, name: str) -> list[Any]:
    """Returns a name for the file, its size and its time of change. They tell if it may have changed."""
    stat = file.stat()
    return [name, stat.st_size, stat.st_mtime_ns]


def files_in(folder: Path) -> list[list[Any]]:
    """Returns `stat_of` each file in a folder, by its name. Empty if there is no folder."""
    return [stat_of(file, file.name) for file in sorted(folder.iterdir())] if folder.is_dir() else []
