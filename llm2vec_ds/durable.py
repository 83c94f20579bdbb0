"""Files and folders that survive a power cut: written, flushed to the disk, only then given their name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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


def replace_file(path: Path, content: bytes) -> None:
    """The file holds its old content or the new one, never a part."""
    new = path.with_name(f".{path.name}.new")
    write_file(new, content)
    rename(new, path)


def remove_folder(folder: Path) -> None:
    """Under another name first, so that a folder that keeps its name is whole."""
    leaving = folder.with_name(f".removed-{folder.name}")
    rename(folder, leaving)
    shutil.rmtree(leaving)
