"""Checkpoint folders: complete or absent, found by checking, and never the last valid one deleted.

    checkpoints/step-00000200/manifest.json        what it is, and size and hash of every other file
                              part-00000.safetensors …   trainable state (engine/trainable_state.py)

A folder is written under another name and renamed when everything in it is on the disk. Which one is the
newest is derived from what is valid; no file points to it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm2vec_ds.distributed import all_gather_object, barrier, rank
from llm2vec_ds.errors import UserError, reason, writing
from llm2vec_ds.storage.durable import put_folder, remove_folder, write_file
from llm2vec_ds.storage.fingerprint import file_sha256, json_sha256
from llm2vec_ds.storage.reading import parse_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")

Hashes = dict[str, tuple[int, str]]
"""File name → size in bytes, SHA-256."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        step: optimizer steps taken.
        identity: what the run is made of (engine/identity.py).
        made_by: versions, commit, ranks and threads: for people, and for warnings.
        score: value of the metric by which the best checkpoint is kept; None where it was not measured.
        files: size in bytes and SHA-256 of every file.
    """

    step: int
    identity: dict[str, Any]
    made_by: dict[str, Any]
    score: float | None = None
    files: Hashes = field(default_factory=dict)

    def dump(self) -> bytes:
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**values, "sha256": json_sha256(values)}, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Raises ValueError for anything but what `dump` wrote."""
        values = parse_json(content)
        if not isinstance(values, dict) or values.pop("sha256", None) != json_sha256(values):
            raise ValueError("its hash does not fit its content")
        if (version := values.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format {version}, this version reads {FORMAT_VERSION}")
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found valid."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


class CheckpointStore:
    """The checkpoints of one run. `save` is called by all ranks together; the rest by any."""

    def __init__(self, folder: Path, *, keep_last: int, lowest_is_best: bool = True) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._sign = 1 if lowest_is_best else -1
        self._known_valid: set[Path] = set()

    def save(self, manifest: Manifest, write_parts: Callable[[Path], Hashes]) -> Path:
        """Writes a checkpoint, then deletes those that are neither among the last nor the best.

        Args:
            write_parts: called on every rank with the unfinished folder; writes this rank's files and
                returns their hashes.

        Raises:
            UserError: on every rank, where any could not write; the earlier checkpoints stay.
        """
        folder = self.folder / f"step-{manifest.step:08d}"
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        self._together(lambda: _empty(unfinished), unfinished, manifest.step, only_rank_0=True)
        written = self._together(lambda: write_parts(unfinished), unfinished, manifest.step)
        files = {name: entry for part in written for name, entry in (part or {}).items()}
        whole = Manifest(manifest.step, manifest.identity, manifest.made_by, manifest.score, files)

        def finish() -> Hashes:
            write_file(unfinished / MANIFEST, whole.dump())
            put_folder(unfinished, folder)
            if unfinished.exists():  # an invalid one, or that of a run that was started again
                shutil.rmtree(unfinished)
            return {}

        self._together(finish, unfinished, manifest.step, only_rank_0=True)
        self._known_valid.add(folder)
        if rank() == 0:
            try:
                self._delete_old()
            except OSError as error:  # the new checkpoint is there all the same
                log.warning("an old checkpoint in %s cannot be deleted: %s", self.folder, error.strerror)
        return folder

    def _together(
        self, work: Callable[[], Hashes], unfinished: Path, step: int, *, only_rank_0: bool = False
    ) -> list[Hashes]:
        """Results of all ranks; one rank's failure is everyone's, so that none waits for it in vain."""
        result: Hashes = {}
        failure = ""
        try:
            if rank() == 0 or not only_rank_0:
                result = work()
        except OSError as error:
            failure = f"rank {rank()}: {reason(error)}"
        outcomes = all_gather_object((result, failure))
        if failures := [said for _, said in outcomes if said]:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            barrier()
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({failures[0]}). "
                f"{self._what_is_left()}"
            )
        return [part for part, _ in outcomes]

    def _what_is_left(self) -> str:
        steps = [step for step, _ in self._folders()]
        if not steps:
            return "There is no earlier checkpoint"
        return f"The checkpoint of step {steps[0]} is untouched: go on from it with resume=true"

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written; None if there never was one.

        An invalid one is named in the log and passed over.

        Raises:
            UserError: there are checkpoints, and not one of them is valid.
        """
        mistakes = []
        for _, folder in self._folders():
            try:
                return self.check(folder)
            except ValueError as error:
                mistakes.append(str(error))
                log.warning("%s; looking for an older checkpoint", error)
        if mistakes:
            raise UserError(
                f"no checkpoint in {self.folder} is valid ({mistakes[0]}): restore one from a copy, "
                "or start again with overwrite=true"
            )
        return None

    def newest(self, n: int) -> list[Checkpoint]:
        """The newest valid ones, newest first, `n` at most; invalid ones are named in the log."""
        found: list[Checkpoint] = []
        for _, folder in self._folders():
            if len(found) == n:
                break
            try:
                found.append(self.check(folder))
            except ValueError as error:
                log.warning("%s; looking for an older checkpoint", error)
        return found

    def best(self) -> Checkpoint | None:
        """The valid checkpoint with the best score, the earliest of equals; None if none has one."""
        for _, folder in sorted(self._scored()):
            try:
                return self.check(folder)
            except ValueError as error:
                log.warning("%s; looking for the next best checkpoint", error)
        return None

    def best_score(self) -> float | None:
        """Of what is there, unchecked."""
        return min(((key * self._sign) for key, _ in self._scored()), key=self.order, default=None)

    def order(self, score: float) -> float:
        """Smaller for a better score."""
        return self._sign * score

    def check(self, folder: Path) -> Checkpoint:
        """Reads every byte.

        Raises:
            ValueError: names the file, and what is wrong with it.
        """
        manifest = _manifest(folder)
        for name, (n_bytes, sha256) in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"checkpoint {folder}: {name} is missing")
            if (found := path.stat().st_size) != n_bytes:
                raise ValueError(f"checkpoint {folder}: {name} has {found} bytes instead of {n_bytes}")
            if file_sha256(path) != sha256:
                raise ValueError(f"checkpoint {folder}: {name} is not what was written (SHA-256 differs)")
        self._known_valid.add(folder)
        return Checkpoint(folder, manifest)

    def clear_unfinished(self) -> None:
        """Deletes what killed runs left under other names.

        Raises:
            UserError: it cannot be deleted.
        """
        with writing(self.folder):
            for pattern in (".unfinished-*", ".removed-*"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left)

    def _folders(self) -> list[tuple[int, Path]]:
        """Step and folder, newest first; whether they are valid is not known."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        named = [(int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name))]
        return sorted(named, reverse=True)

    def _scored(self) -> list[tuple[float, Path]]:
        scored = []
        for _, folder in self._folders():
            try:
                score = _manifest(folder).score
            except ValueError:
                continue
            if score is not None:
                scored.append((self.order(score), folder))
        return scored

    def _delete_old(self) -> None:
        """Only those that this run wrote or checked count as kept; any other may be worthless."""
        valid = [folder for _, folder in self._folders() if folder in self._known_valid]
        kept = set(valid[: self.keep_last])
        if scored := [pair for pair in self._scored() if pair[1] in self._known_valid]:
            kept.add(min(scored)[1])
        for folder in valid:
            if folder not in kept:
                remove_folder(folder)
        oldest_kept = min(int(_NAME.fullmatch(folder.name)[1]) for folder in kept)  # type: ignore[index]
        for step, folder in self._folders():
            if folder not in self._known_valid and step < oldest_kept:
                remove_folder(folder)


def _empty(folder: Path) -> Hashes:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return {}


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.parse((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder}: {MANIFEST} is missing") from None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error})") from None
