"""Files and folders that survive a power cut: written, flushed to the disk, only then given their name."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

RENAME_EXCHANGE, AT_FDCWD = 2, -100
"""Of Linux (renameat2(2))."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def write_file(path: Path, content: bytes) -> None:
    """The whole of `content` is on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable; what the files hold is theirs to flush."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Atomic, and durable when this returns."""
    old.rename(new)
    sync_folder(new.parent)


def sync_tree(folder: Path) -> None:
    """Makes every file below `folder` durable, and every name."""
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
    """Swaps two folders side by side, atomic and durable when this returns.

    Where the system or the file system cannot swap, three renames do it: killed between them, `old` is at
    `aside_of(new)`.
    """
    if not _exchanged(new, old):
        aside = aside_of(new)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
    sync_folder(old.parent)


def aside_of(new: Path) -> Path:
    """Where `exchange` puts the old folder for a moment."""
    return new.with_name(f"{new.name}.old")


def _exchanged(new: Path, old: Path) -> bool:
    """False: this system cannot."""
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
    """The file holds its old content or the new one, never a part."""
    new = unfinished_file(path)
    write_file(new, content)
    rename(new, path)


def unfinished_file(path: Path) -> Path:
    """Where `replace_file` writes, and what a kill leaves of it."""
    return path.with_name(f".{path.name}.new")


def replace_text(path: Path, text: str) -> None:
    """The same of text."""
    replace_file(path, text.encode())


def replace_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """The same of a value that JSON can hold."""
    replace_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def move_file(new: Path, place: Path) -> None:
    """A finished file takes its place, whole, durable when this returns."""
    _sync_file(new)
    rename(new, place)


def put_folder(unfinished: Path, place: Path) -> None:
    """A finished folder takes its place in one move, durable when this returns; a folder that was there has
    the unfinished one's name afterwards."""
    sync_tree(unfinished)
    (exchange if place.exists() else rename)(unfinished, place)


def write_at(path: Path, content: bytes, offset: int, whence: int = os.SEEK_SET) -> int:
    """Puts `content` at its place in a file, safe on the disk when this returns; returns where it ends."""
    with path.open("r+b") as file:
        file.seek(offset, whence)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def remove_folder(folder: Path) -> None:
    """Under another name first, so that a folder that keeps its name is whole."""
    leaving = folder.with_name(f".removed-{folder.name}")
    rename(folder, leaving)
    shutil.rmtree(leaving)
