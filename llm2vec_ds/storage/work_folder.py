"""A folder of long work that a killed run left and another goes on with: whose it is, and safe writing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2vec_ds.storage.durable import replace_text
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


def _empty_unless_same(folder: Path, key: str) -> None:
    file = folder / KEY
    left = file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    if left == key:
        log.info("%s: going on with what an earlier run left", folder)
        return
    if left is not None:
        log.info("%s: left by a run of other options, texts or model: starting again", folder)
    for old in folder.iterdir():
        if old.name != LOCK:
            old.unlink()
    replace_text(file, key)
