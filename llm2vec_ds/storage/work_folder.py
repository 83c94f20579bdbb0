"""A folder of long work that a killed run left and another goes on with: whose it is, and safe writing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2vec_ds.storage.durable import replace_file
from llm2vec_ds.storage.lock import held

log = logging.getLogger(__name__)

LOCK, KEY = "lock", "key"


@contextmanager
def work_folder(folder: Path, key: str) -> Iterator[None]:
    """Makes `folder`, or goes on with what is in it; empties it first where it was begun under another key.

    Raises:
        UserError: another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK, folder):
        _empty_unless_same(folder, key)
        yield


def write_at(path: Path, content: bytes, offset: int, whence: int = os.SEEK_SET) -> int:
    """Puts `content` at its place in a file, safe on the disk when this returns; returns where it ends."""
    with path.open("r+b") as file:
        file.seek(offset, whence)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def replace_text(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part."""
    replace_file(path, text.encode())


def _empty_unless_same(folder: Path, key: str) -> None:
    file = folder / KEY
    left = file.read_text(errors="replace") if file.exists() else None
    if left == key:
        log.info("%s: going on with what an earlier run left", folder)
        return
    if left is not None:
        log.info("%s: left by a run of other options, texts or model: starting anew", folder)
    for old in folder.iterdir():
        if old.name != LOCK:
            old.unlink()
    replace_text(file, key)
