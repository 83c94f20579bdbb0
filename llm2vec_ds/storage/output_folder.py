"""Replaces an output folder as a whole. It is never there in part, and files of others in it are not lost.

    .NAME.unfinished-RANDOM ─► written, flushed to the disk ─► replaces NAME in one step

A manifest in the folder lists the files that this toolkit wrote. Only these are replaced. All other files
move to the new folder. A folder with files, but none of this toolkit, is refused.
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
# Version 0.1 wrote no manifest. Its folders have a settings file with a version, and files of these names.
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
    """The content of MANIFEST. `files` are relative to the folder."""

    format_version: int
    llm2vec_ds_version: str
    files: list[str]


@contextmanager
def replaced_folder(folder: Path, what: str, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields an empty folder to write into. At the end of the block it replaces `folder` in one step.

    If the process is killed at any moment, `folder` is the complete old one or the complete new one.
    Leftovers of an earlier kill are removed.

    Args:
        what: name of the folder in messages.
        sources: what the content is made from. `folder` must not contain it.

    Raises:
        UserError: as `check_replaceable`. Or a new file has the name of a file that this toolkit did not
            write.
        OSError: the folder cannot be written.
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
            shutil.rmtree(unfinished, ignore_errors=True)  # after the swap this is the old folder


def check_replaceable(folder: Path, what: str, sources: Iterable[Path] = ()) -> Path:
    """Checks that a folder may be written or replaced. Returns its path without symbolic links.

    Raises:
        UserError: it contains the sources, the current folder or the home folder. Or it has files, but none
            of this toolkit. Or it is no folder, or one that cannot be moved.
    """
    place = resolved(folder, what)
    if place.exists() and not place.is_dir():
        raise UserError(f"{what} is a file: name a folder")
    if place == Path(place.anchor):
        raise UserError(f"{what} is the root of the file system: name a folder in it")
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home() raises if the user has none)
    for inside, name in ((home, "your home folder"), (Path.cwd(), "the folder you are in")):
        if _holds(place, inside.resolve()):
            raise UserError(f"{what} is or holds {name}: name a folder in it")
    if os.path.ismount(place):
        raise UserError(f"{what} is a mount point, which cannot be replaced: name a folder in it")
    for source in sources:
        if _holds(place, source.resolve()):
            raise UserError(f"{what} holds {source}, which is an input: choose another folder")
    if place.exists() and any(place.iterdir()) and not written_files(place):
        raise UserError(
            f"{what} holds files, but no encoder or export of this toolkit: choose another folder, or move "
            "these files away"
        )
    return place


def check_new_folder(folder: Path, what: str, sources: Iterable[Path], overwrite: bool) -> None:
    """Checks that a folder is new, or may be replaced.

    Raises:
        UserError: as `check_replaceable`. Or it exists, and `overwrite` is false.
    """
    if check_replaceable(folder, what, sources).exists() and not overwrite:
        raise UserError(f"{what} exists: choose another, or give --overwrite")


def check_new_file(file: Path, what: str, overwrite: bool) -> None:
    """Checks that a file is new, or may be replaced.

    Raises:
        UserError: it is a folder. Or it exists, and `overwrite` is false.
    """
    if file.is_dir():
        raise UserError(f"{what} is a folder: name a file in it, such as {file / ('new' + file.suffix)}")
    if file.exists() and not overwrite:
        raise UserError(f"{what} exists: choose another, or give --overwrite")


def check_no_foreign(folder: Path, what: str, names: Iterable[str], marks: Iterable[str]) -> None:
    """Checks that files of others in a folder are not overwritten. The folder itself is not replaced.

    Args:
        names: files that will be written into it.
        marks: every folder that the same command wrote has one of these.

    Raises:
        UserError: it holds one of `names`, and none of `marks`.
    """
    found = [name for name in names if (folder / name).exists()]
    if found and not any((folder / mark).exists() for mark in marks):
        raise UserError(
            f"{what} holds {found[0]}, which would be overwritten: choose another folder, or move it away"
        )


def check_reads_no_output(outputs: Iterable[Path], inputs: Iterable[Path], what: str) -> None:
    """Checks that no output is one of the inputs, also under another name.

    Raises:
        UserError: an output is an input.
    """
    read = [path for path in inputs if path.exists()]
    for output in outputs:
        if output.exists() and any(path.samefile(output) for path in read):
            raise UserError(f"{what} would overwrite {output}, which is an input: choose another output")


def resolved(path: Path, what: str) -> Path:
    """Returns the absolute path, with `~` expanded and without symbolic links.

    Raises:
        UserError: there is no such user, or the links form a circle.
    """
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for both
        raise UserError(f"{what}: {str(error).rstrip('.')}: give another path") from None


def written_files(folder: Path) -> set[str]:
    """Returns the files that this toolkit wrote into the folder, relative to it. The set may be empty.

    Without a manifest, version 0.1 may have written the folder. Then its files are known by their names.
    """
    try:
        manifest = checked_json((folder / MANIFEST).read_bytes(), Manifest)
    except FileNotFoundError:
        return _files_of_0_1(folder)
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s): treating the folder as not ours", folder / MANIFEST, error)
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
    """Links files of others from the old folder into the new one. So they exist at every moment."""
    own = written_files(old)
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if str(name) in own or (path.is_dir() and not path.is_symlink()):
            continue
        target = new / name
        if os.path.lexists(target):
            raise UserError(
                f"{what} holds {name}, which this toolkit did not write but would replace: move it away"
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
    """Cleans up what killed processes left beside `place`."""
    name = glob.escape(place.name)
    for lock in place.parent.glob(f".{name}.unfinished-*.lock"):
        left = lock.with_suffix("")
        aside = aside_of(left)
        with suppress(UserError), held(lock, left):  # if this fails, its process is still running
            if aside.exists() and not place.exists():
                rename(aside, place)
            for folder in (left, aside):
                if folder.exists():
                    shutil.rmtree(folder)
                    log.info("removed %s, which a killed process had left", folder)
    for left in place.parent.glob(f".{name}.*"):  # of version 0.1
        if re.fullmatch(r"\.[0-9a-f]{8}", left.name.removeprefix(f".{place.name}")) and _is_of_0_1(left):
            shutil.rmtree(left)
            log.info("removed %s, which a killed process had left", left)


def _is_of_0_1(folder: Path) -> bool:
    """Returns whether the folder holds only files of version 0.1."""
    known = {file for pattern in FILES_OF_0_1 for file in folder.glob(pattern)}
    return folder.is_dir() and all(path in known for path in folder.rglob("*") if not path.is_dir())
