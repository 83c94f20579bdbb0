"""A folder of files that are made once and used by many runs: complete or absent, and checked before use.

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
    """What a kept folder says of itself.

    Attributes:
        files: relative to the folder, or absolute where they lie elsewhere.
        fingerprint: SHA-256 over their contents, in this order.
    """

    files: list[str]
    fingerprint: str


def keep(folder: Path, what: str, make: Callable[[Path], list[str]]) -> None:
    """Makes the folder if it is not there yet, or damaged. One process does, the others wait.

    Args:
        what: names it in messages.
        make: fills an unfinished folder, which may hold what a killed run left; returns the files.

    Raises:
        UserError: it cannot be written.
    """
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with held(root / f".{folder.name}.lock", f"{what} in {root}", wait=True):
            if folder.is_dir() and (damage := _damage_of(folder)):
                log.warning("%s in %s: damaged (%s), made again", what, folder, damage)
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
    """Raises UserError where the manifest is damaged or gone."""
    return read_json(folder / MANIFEST, Kept, f"remove {folder}, then prepare again")


def _damage_of(folder: Path) -> str | None:
    """What is wrong with a kept folder; None: nothing. Reads all of it."""
    try:
        kept = read_kept(folder)
        if _fingerprint(folder, kept.files) != kept.fingerprint:
            return "its files are not those that were written"
    except (UserError, OSError) as error:
        return str(error)
    return None


def _fingerprint(folder: Path, files: list[str]) -> str:
    # From two seconds on a bar is shown: large files take a while.
    return files_sha256(folder / name for name in tqdm(files, desc="check", disable=None, delay=2))
