"""Writes files and folders that survive a power cut. They get their name only after they are on the disk."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

RENAME_EXCHANGE, AT_FDCWD = 2, -100
"""Constants of Linux (renameat2(2))."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file. All of `content` is on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable. It does not flush the content of the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Renames a file or folder. This is atomic, and durable when it returns."""
    old.rename(new)
    sync_folder(new.parent)


def sync_tree(folder: Path) -> None:
    """Makes all files below `folder` durable, with their content and their names."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent) / name
            if path.is_symlink():
                continue
            _sync_file(path)
        sync_folder(Path(parent))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(new: Path, old: Path) -> None:
    """Swaps two folders with the same parent. This is atomic, and durable when it returns.

    If the system or the file system cannot swap, three renames do it. If the process is killed between them,
    `old` is at `aside_of(new)`.
    """
    if not _exchanged(new, old):
        aside = aside_of(new)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
    sync_folder(old.parent)


def aside_of(new: Path) -> Path:
    """Returns where `exchange` puts the old folder for a moment."""
    return new.with_name(f"{new.name}.old")


def _exchanged(new: Path, old: Path) -> bool:
    """Swaps two folders in one operation. Returns False if this system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    first, second = os.fsencode(new), os.fsencode(old)
    if renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(old))


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file. At any moment it holds the old content or the new one, never a part."""
    new = unfinished_file(path)
    write_file(new, content)
    rename(new, path)


def unfinished_file(path: Path) -> Path:
    """Returns the file that `replace_file` writes first. A killed process may leave it."""
    return path.with_name(f".{path.name}.new")


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file, as `replace_file`."""
    replace_file(path, text.encode())


def replace_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Replaces a JSON file, as `replace_file`."""
    replace_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def move_file(new: Path, place: Path) -> None:
    """Moves a finished file to its place. This is atomic, and durable when it returns."""
    _sync_file(new)
    rename(new, place)


def put_folder(unfinished: Path, place: Path) -> None:
    """Moves a finished folder to its place in one step. This is durable when it returns.

    If there was a folder at this place, it now has the name of the unfinished one.
    """
    sync_tree(unfinished)
    (exchange if place.exists() else rename)(unfinished, place)


def write_at(path: Path, content: bytes, offset: int, whence: int = os.SEEK_SET) -> int:
    """Writes `content` at an offset in a file. It is on the disk when this returns. Returns where it ends."""
    with path.open("r+b") as file:
        file.seek(offset, whence)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def remove_folder(folder: Path) -> None:
    """Removes a folder. Renames it first, so that a folder under its own name is always complete."""
    leaving = folder.with_name(f".removed-{folder.name}")
    rename(folder, leaving)
    shutil.rmtree(leaving)
