"""The checkpoint folders of a run.

    checkpoints/step-00000200/manifest.json        what the checkpoint is; size and hash of each other file
                              part-00000.safetensors …   trainable state (engine/trainable_state.py)

A folder is either complete or absent. It is written under another name, and renamed when all its files are on
the disk. No file points to the newest checkpoint: the newest valid folder is the newest checkpoint. The last
valid checkpoint is never deleted.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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
"""Maps a file name to its size in bytes and its SHA-256."""


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint. The folder holds it as `manifest.json`.

    Attributes:
        step: optimizer steps taken.
        identity: what the run is made of (engine/identity.py).
        made_by: versions, commit, ranks and threads. People read them, and warnings compare them.
        score: the metric that decides which checkpoint is best. None if it was not measured.
        score_of: the name of that metric. None: there is no score, or an earlier version wrote it.
        files: size in bytes and SHA-256 of every file.
    """

    step: int
    identity: dict[str, Any]
    made_by: dict[str, Any]
    score: float | None = None
    score_of: str | None = None
    files: Hashes = field(default_factory=dict)

    def dump(self) -> bytes:
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**values, "sha256": json_sha256(values)}, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Reads what `dump` wrote. Raises ValueError for anything else."""
        values = parse_json(content)
        if not isinstance(values, dict) or values.pop("sha256", None) != json_sha256(values):
            raise ValueError("its hash does not match its content")
        if (version := values.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"its format is {version}, but this version reads format {FORMAT_VERSION}")
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: every byte was checked."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


class CheckpointStore:
    """The checkpoints of one run. All ranks call `save` together. Any rank may call the other methods."""

    def __init__(
        self, folder: Path, *, keep_last: int, best_by: str | None = None, lowest_is_best: bool = True
    ) -> None:
        """
        Args:
            best_by: the metric that decides which checkpoint is best. Scores of another metric do not count.
        """
        self.folder = folder
        self.keep_last = keep_last
        self._best_by = best_by
        self._sign = 1 if lowest_is_best else -1
        self._known_valid: set[Path] = set()

    def save(self, manifest: Manifest, write_parts: Callable[[Path], Hashes]) -> Path:
        """Writes a checkpoint. Then deletes all but the last `keep_last` and the best.

        Args:
            write_parts: called on every rank with the unfinished folder. It writes this rank's files and
                returns their hashes.

        Raises:
            UserError: a rank could not write. Every rank raises it, and earlier checkpoints stay.
        """
        folder = self.folder / f"step-{manifest.step:08d}"
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        self._together(lambda: _empty(unfinished), unfinished, manifest.step, only_rank_0=True)
        written = self._together(lambda: write_parts(unfinished), unfinished, manifest.step)
        files = {name: entry for part in written for name, entry in (part or {}).items()}
        whole = replace(manifest, files=files)

        def finish() -> Hashes:
            write_file(unfinished / MANIFEST, whole.dump())
            put_folder(unfinished, folder)
            # `folder` may have existed: invalid, or from a run that was started again. `put_folder` then
            # swaps the two, and the old one has the unfinished name now.
            if unfinished.exists():
                shutil.rmtree(unfinished)
            return {}

        self._together(finish, unfinished, manifest.step, only_rank_0=True)
        self._known_valid.add(folder)
        if rank() == 0:
            try:
                self._delete_old()
            except OSError as error:  # the new checkpoint is complete, so the run can continue
                log.warning("an old checkpoint in %s cannot be deleted: %s", self.folder, error.strerror)
        return folder

    def _together(
        self, work: Callable[[], Hashes], unfinished: Path, step: int, *, only_rank_0: bool = False
    ) -> list[Hashes]:
        """Runs `work` and returns the results of all ranks.

        If one rank fails, every rank raises. Otherwise the others would wait for it at the next collective.
        """
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
        """Returns the newest valid checkpoint, or None if there are no checkpoints.

        Skips invalid ones and names them in the log.

        Raises:
            UserError: there are checkpoints, but none is valid.
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
        """Returns at most `n` valid checkpoints, newest first. Names invalid ones in the log."""
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
        """Returns the valid checkpoint with the best score, or None if none has a score.

        Among equal scores the earliest step wins.
        """
        for _, folder in self._scored():
            try:
                return self.check(folder)
            except ValueError as error:
                log.warning("%s; looking for the next best checkpoint", error)
        return None

    def best_score(self) -> float | None:
        """Returns the best score in the manifests. Other files are not checked."""
        return next((order * self._sign for order, _ in self._scored()), None)

    def order(self, score: float) -> float:
        """Returns a number that is smaller for a better score."""
        return self._sign * score

    def check(self, folder: Path) -> Checkpoint:
        """Reads every byte of a checkpoint and compares sizes and hashes.

        Raises:
            ValueError: the checkpoint is invalid. Names the file and what is wrong with it.
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
        """Deletes folders that killed runs left half written or half deleted.

        Raises:
            UserError: a folder cannot be deleted.
        """
        with writing(self.folder):
            for pattern in (".unfinished-*", ".removed-*"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left)

    def _folders(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, newest first. They are not checked."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        named = [(int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name))]
        return sorted(named, reverse=True)

    def _scored(self) -> list[tuple[float, Path]]:
        """Order (smaller is better) and folder of each checkpoint with a score and a readable manifest.

        The best comes first. Among equal scores it is the earliest step.
        """
        scored = []
        for _, folder in self._folders():
            try:
                manifest = _manifest(folder)
            except ValueError:
                continue
            if manifest.score is not None and manifest.score_of in (None, self._best_by):
                scored.append((self.order(manifest.score), folder))
        return sorted(scored)

    def _delete_old(self) -> None:
        """Keeps the last `keep_last` checkpoints and the best, and deletes older ones.

        Runs after the new checkpoint is on the disk under its final name.
        """
        # A folder counts as kept only if this process wrote or checked it. Any other may be damaged: if such
        # folders filled the `keep_last` places, every valid checkpoint could be deleted.
        valid = [folder for _, folder in self._folders() if folder in self._known_valid]
        kept = set(valid[: self.keep_last])
        # An earlier process may have written the best one.
        best = next((folder for _, folder in self._scored() if self._is_valid(folder)), None)
        if best is not None:
            kept.add(best)
        for folder in valid:
            if folder not in kept:
                remove_folder(folder)
        # An unchecked folder may also be valid. So it goes only when every kept checkpoint is newer.
        newest = kept - {best} or kept
        oldest_kept = min(int(_NAME.fullmatch(folder.name)[1]) for folder in newest)  # type: ignore[index]
        for step, folder in self._folders():
            if folder not in self._known_valid and step < oldest_kept:
                remove_folder(folder)

    def _is_valid(self, folder: Path) -> bool:
        if folder in self._known_valid:
            return True
        try:
            self.check(folder)
        except ValueError as error:
            log.warning("%s", error)
            return False
        return True


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
