"""Short texts that are equal for equal contents: keys of what is kept, and hashes of what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY_CHARACTERS = 24


def key_of(*parts: Any, version: int) -> str:
    """Key of a kept result: the same for the same parts and version of its format.

    Args:
        parts: what the result depends on; JSON must be able to hold them.
        version: of the format, and of how the result is computed: raise it when either changes. Version 1
            is not written into the key, because it is older than versions are.
    """
    digest = json_sha256(list(parts))[:KEY_CHARACTERS]
    return digest if version == 1 else f"v{version}-{digest}"


def json_sha256(value: Any) -> str:
    """Of a value that JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """Of the contents of several files in their order; their names do not count."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file in a folder; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
