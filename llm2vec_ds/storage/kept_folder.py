"""A folder of files that are made once and used by many runs.

It is complete or absent, and it is checked before use.

.NAME.unfinished ─► filled, perhaps by several runs ─► manifest with SHA-256 ─► NAME
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llm2vec_ds.errors import UserError, reason
from llm2vec_ds.storage.durable import put_folder, replace_json
from llm2vec_ds.storage.fingerprint import files_sha256
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.reading import read_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kept:
    """The manifest of a kept folder.

    Attributes:
        files: paths relative to the folder, or absolute paths of files elsewhere.
        fingerprint: SHA-256 over their contents, in this order.
    """

    files: list[str]
    fingerprint: str


def keep(folder: Path, what: str, make: Callable[[Path], list[str]]) -> None:
    """Makes the folder if it is missing or damaged. One process does this, the others wait.

    Args:
        what: name of the folder in messages.
        make: fills an unfinished folder and returns the files. The folder may hold files of a killed run.

    Raises:
        UserError: it cannot be written.
    """
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with held(root / f".{folder.name}.lock", f"{what} in {root}", wait=True):
            if folder.is_dir() and (damage := _damage_of(folder)):
                log.warning("%s in %s: damaged (%s), making it again", what, folder, damage)
                shutil.rmtree(folder)
            if not folder.is_dir():
                unfinished = folder.with_name(f".{folder.name}.unfinished")
                unfinished.mkdir(exist_ok=True)
                files = make(unfinished)
                replace_json(unfinished / MANIFEST, asdict(Kept(files, _fingerprint(unfinished, files))))
                put_folder(unfinished, folder)
    except OSError as error:
        raise UserError(f"{what} in {root} cannot be written: {reason(error)}") from None


def read_kept(folder: Path) -> Kept:
    """Reads the manifest of a kept folder.

    Raises:
        UserError: the manifest is damaged or missing.
    """
    return read_json(folder / MANIFEST, Kept, f"remove {folder}, then prepare again")


def _damage_of(folder: Path) -> str | None:
    """Returns what is wrong with a kept folder, or None. Reads all of it."""
    try:
        kept = read_kept(folder)
        if _fingerprint(folder, kept.files) != kept.fingerprint:
            return "its content has changed"
    except (UserError, OSError) as error:
        return str(error)
    return None


def _fingerprint(folder: Path, files: list[str]) -> str:
    # Large files take a while, so a bar appears after two seconds.
    return files_sha256(folder / name for name in tqdm(files, desc="check", disable=None, delay=2))
