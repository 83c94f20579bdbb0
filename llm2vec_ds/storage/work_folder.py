"""A folder for long work. If a run is killed, the next one continues with what the folder holds."""

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
    """Creates `folder`, or continues with its content. Empties it first if it belongs to another key.

    Raises:
        UserError: another process is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK, folder):
        _empty_unless_same(folder, key)
        yield


def _empty_unless_same(folder: Path, key: str) -> None:
    file = folder / KEY
    left = file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    if left == key:
        log.info("%s: continuing what an earlier run began", folder)
        return
    if left is not None:
        log.info("%s: an earlier run had other options, texts or another model: starting again", folder)
    for old in folder.iterdir():
        if old.name != LOCK:
            old.unlink()
    replace_text(file, key)
