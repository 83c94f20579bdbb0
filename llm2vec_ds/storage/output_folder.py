"""A folder that is replaced as a whole: nothing of others in it is lost, and it is never there in part.

    .NAME.unfinished-RANDOM ─► written, flushed to the disk ─► takes the place of NAME in one move

A manifest in the folder lists the files that were written. When the folder is replaced, only these go; what
others have put beside them is taken along. A folder without a manifest is not touched at all.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from llm2vec_ds import __version__
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.durable import aside_of, put_folder, rename, replace_json
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.reading import checked_json, parse_json

log = logging.getLogger(__name__)

MANIFEST = "llm2vec_ds_files.json"
FORMAT_VERSION = 1
# Version 0.1 wrote no manifest. Its folders have this file with a version in it, and files of these names.
SETTINGS_OF_0_1 = "llm2vec_ds.json"
FILES_OF_0_1 = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    SETTINGS_OF_0_1,
    "adapters/stack.json",
    "adapters/[0-9]*.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST holds: `files`, relative to the folder."""

    format_version: int
    llm2vec_ds_version: str
    files: list[str]


@contextmanager
def replaced_folder(folder: Path, what: str, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Gives an empty folder to write into. When the block ends, it takes the place of `folder` in one move:
    killed at any moment, `folder` is the old one or the new one, whole. What an earlier kill left is removed.

    Args:
        what: names the folder in messages.
        sources: what the content is made from; `folder` must not hold it.

    Raises:
        UserError: as `check_replaceable`; or the new folder has a file where the old one has another's.
        OSError: it cannot be written.
    """
    place = check_replaceable(folder, what, sources)
    place.parent.mkdir(parents=True, exist_ok=True)
    _recover(place)
    unfinished = place.with_name(f".{place.name}.unfinished-{uuid.uuid4().hex[:8]}")
    lock = unfinished.with_name(f"{unfinished.name}.lock")
    with held(lock, what):
        try:
            unfinished.mkdir()
            yield unfinished
            _write_manifest(unfinished)
            if place.exists():
                _take_along(place, unfinished, what)
            put_folder(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # after the exchange: the old folder


def check_replaceable(folder: Path, what: str, sources: Iterable[Path] = ()) -> Path:
    """The folder's own place, without symbolic links; it may be written or replaced.

    Raises:
        UserError: it holds nothing that this toolkit wrote, or the sources, the current folder or a home; or
            it is no folder, or one that cannot be moved.
    """
    place = resolved(folder, what)
    if place.exists() and not place.is_dir():
        raise UserError(f"{what} is a file: name a folder")
    if place == Path(place.anchor):
        raise UserError(f"{what} is the root of the file system: name a folder in it")
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home() raises where the user has none)
    for inside, name in ((home, "your home folder"), (Path.cwd(), "the folder you are in")):
        if _holds(place, inside.resolve()):
            raise UserError(f"{what} is or holds {name}: name a folder in it")
    if os.path.ismount(place):
        raise UserError(f"{what} is a mount point, which cannot be replaced: name a folder in it")
    for source in sources:
        if _holds(place, source.resolve()):
            raise UserError(f"{what} holds {source}, which is read: choose another folder")
    if place.exists() and any(place.iterdir()) and not written_files(place):
        raise UserError(
            f"{what} holds files, and no encoder or export of this toolkit: choose another folder, or move "
            "what is in it"
        )
    return place


def check_no_foreign(folder: Path, what: str, names: Iterable[str], marks: Iterable[str]) -> None:
    """For a folder that is worked in and not replaced: files in it are written over only where they are ours.

    Args:
        names: what is written into it.
        marks: one of these is in every folder that was written by the same command.

    Raises:
        UserError: it holds one of `names`, and none of `marks`.
    """
    found = [name for name in names if (folder / name).exists()]
    if found and not any((folder / mark).exists() for mark in marks):
        raise UserError(
            f"{what} holds {found[0]}, which would be written over: choose another folder, or move it away"
        )


def check_reads_no_output(outputs: Iterable[Path], inputs: Iterable[Path], what: str) -> None:
    """Raises UserError where an output is one of the inputs, also by another name."""
    read = [path for path in inputs if path.exists()]
    for output in outputs:
        if output.exists() and any(path.samefile(output) for path in read):
            raise UserError(f"{what} would write over {output}, which it reads: choose another output")


def resolved(path: Path, what: str) -> Path:
    """Absolute, with `~` expanded, and without symbolic links.

    Raises:
        UserError: there is no such user, or links lead in a circle.
    """
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for both
        raise UserError(f"{what}: {str(error).rstrip('.')}: give another path") from None


def written_files(folder: Path) -> set[str]:
    """Files that this toolkit wrote into the folder, relative to it; none if there is no manifest."""
    try:
        manifest = checked_json((folder / MANIFEST).read_bytes(), Manifest)
    except FileNotFoundError:
        return _files_of_0_1(folder)
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s): the folder counts as another's", folder / MANIFEST, error)
        return set()
    return {name for name in manifest.files if _is_inside(name)} | {MANIFEST}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _files_of_0_1(folder: Path) -> set[str]:
    try:
        settings = parse_json((folder / SETTINGS_OF_0_1).read_bytes())
    except (OSError, ValueError):
        return set()
    if not isinstance(settings, dict) or "llm2vec_ds_version" not in settings:
        return set()
    return {str(file.relative_to(folder)) for pattern in FILES_OF_0_1 for file in folder.glob(pattern)}


def _holds(folder: Path, path: Path) -> bool:
    return folder == path or folder in path.parents


def _write_manifest(folder: Path) -> None:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    manifest = Manifest(FORMAT_VERSION, __version__, files)
    replace_json(folder / MANIFEST, asdict(manifest))


def _take_along(old: Path, new: Path, what: str) -> None:
    """Others' files in the old folder get a second name in the new one, so that no moment lacks them."""
    own = written_files(old)
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if str(name) in own or (path.is_dir() and not path.is_symlink()):
            continue
        target = new / name
        if os.path.lexists(target):
            raise UserError(
                f"{what} holds {name}, which this toolkit did not write, and would replace it: move it away"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(path, target)
    for path in (p for p in old.rglob("*") if p.is_dir() and not p.is_symlink() and not any(p.iterdir())):
        (new / path.relative_to(old)).mkdir(parents=True, exist_ok=True)
    shutil.copymode(old, new)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(path, target, follow_symlinks=False)


def _recover(place: Path) -> None:
    """Puts right what killed processes left beside `place`."""
    name = glob.escape(place.name)
    for lock in place.parent.glob(f".{name}.unfinished-*.lock"):
        left = lock.with_suffix("")
        aside = aside_of(left)
        with suppress(UserError), held(lock, left):  # else its process still works
            if aside.exists() and not place.exists():
                rename(aside, place)
            for folder in (left, aside):
                if folder.exists():
                    shutil.rmtree(folder)
                    log.info("%s removed, which a process that was killed had left", folder)
    for left in place.parent.glob(f".{name}.*"):  # of version 0.1
        if re.fullmatch(r"\.[0-9a-f]{8}", left.name.removeprefix(f".{place.name}")) and _is_of_0_1(left):
            shutil.rmtree(left)
            log.info("%s removed, which a process that was killed had left", left)


def _is_of_0_1(folder: Path) -> bool:
    """Does it hold nothing but what version 0.1 wrote?"""
    known = {file for pattern in FILES_OF_0_1 for file in folder.glob(pattern)}
    return folder.is_dir() and all(path in known for path in folder.rglob("*") if not path.is_dir())
