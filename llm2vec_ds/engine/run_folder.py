"""The folder of a run: which run it holds, and whether a run may start there.

encoder/of_run.py says whether the run has finished.

run.json        what the run is made of (engine/identity.py); written before the first step
recipe.yaml     its recipe, with every default filled in
metrics.jsonl, held_out.jsonl, memory.json, monitor/, checkpoints/
encoder/        the result
finished        number of steps, and SHA-256 of the identity in run.json; written after encoder/
lock            which process works here now (storage/lock.py)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm2vec_ds import __version__
from llm2vec_ds.encoder.of_run import (
    CHECKPOINTS,
    ENCODER,
    FINISHED,
    HELD_OUT,
    METRICS,
    RECIPE,
    RUN,
    Identity,
    RunFile,
    check_is_of_finished_run,
    identity_stored_in,
    is_run,
)
from llm2vec_ds.engine.identity import changes, recipe_identity
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.process.preemption import STOP_FILE
from llm2vec_ds.recipe.files import dump_recipe, load_recipe
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.durable import replace_json, sync_folder, unfinished_file
from llm2vec_ds.storage.fingerprint import json_sha256
from llm2vec_ds.storage.output_folder import check_replaceable, resolved

MONITOR, LOCK = "monitor", "lock"
WANDB_RUN_ID = "wandb_run_id"
FORMAT_VERSION = 1
WRITTEN = (RUN, RECIPE, METRICS, HELD_OUT, "memory.json", FINISHED, CHECKPOINTS, MONITOR, ENCODER)
CHECKPOINT_FOLDERS = ("step-*", ".unfinished-*", ".removed-*")
MONITOR_FILES = ("csv/train_*.csv", "csv/held_out_*.csv", "tensorboard/events.out.tfevents.*", WANDB_RUN_ID)


def check_run_folder(recipe: Recipe, folder: Path) -> None:
    """Checks that the recipe's run may start or resume in `folder`. Creates the folder.

    Raises:
        UserError: it may not. Says why, and what to do.
    """
    what = f"output_dir {folder}"
    place = resolved(folder, what)
    if place.exists() and not place.is_dir():
        raise UserError(f"{what} is a file: choose another")
    model = Path(recipe.model.path)
    if model.exists() and place in (model.resolve(), *model.resolve().parents):
        raise UserError(f"{what} holds model.path {model}, which training reads: choose another output_dir")
    check_is_of_finished_run(model)
    if not is_run(folder) and (others := [name for name in WRITTEN if (folder / name).exists()]):
        raise UserError(
            f"{what} holds {others[0]}, which no run wrote: choose another output_dir, or move it away"
        )
    if (folder / METRICS).exists() and not (recipe.overwrite or recipe.resume):
        raise UserError(
            f"{folder} already holds a run: continue it with resume=true, choose another output_dir, or "
            "pass overwrite=true"
        )
    if (folder / STOP_FILE).exists():
        raise UserError(f"{folder / STOP_FILE} is there to keep this run from starting: remove it first")
    with writing(what):
        folder.mkdir(parents=True, exist_ok=True)
        check_replaceable(folder / ENCODER, f"{what}: its {ENCODER}/")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{what} cannot be written: choose a path that you can write to")


def begin(recipe: Recipe, folder: Path, identity: Mapping[str, Any], *, fresh: bool) -> None:
    """Writes run.json and recipe.yaml, which describe the run.

    An older `encoder/` stays until the new one replaces it. Without `finished` it does not count as this
    run's.

    Args:
        fresh: the run starts at step 1. Files of an earlier run are deleted first.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(f"output_dir {folder}"):
        (folder / FINISHED).unlink(missing_ok=True)
        sync_folder(folder)  # first: `finished` must not survive a change that makes it untrue
        if fresh:
            for path in _left_by_a_run(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        described = RunFile(FORMAT_VERSION, __version__, Identity(**identity))
        replace_json(folder / RUN, asdict(described))
        dump_recipe(recipe, folder / RECIPE)


def clear_unfinished(folder: Path) -> None:
    """Deletes files that a killed run in this folder left half written.

    Raises:
        UserError: a file cannot be deleted.
    """
    if not is_run(folder):
        return
    with writing(f"output_dir {folder}"):
        for name in WRITTEN:
            unfinished_file(folder / name).unlink(missing_ok=True)


def _left_by_a_run(folder: Path) -> Iterator[Path]:
    """Metrics, checkpoints and monitor files of a run. Files that no run writes are not among them."""
    yield from (folder / name for name in (METRICS, HELD_OUT) if (folder / name).exists())
    for pattern in CHECKPOINT_FOLDERS:
        yield from list((folder / CHECKPOINTS).glob(pattern))
    for pattern in MONITOR_FILES:
        yield from list((folder / MONITOR).glob(pattern))


def mark_finished(folder: Path, max_steps: int, identity: Mapping[str, Any]) -> None:
    """Writes `finished`. Call it after `encoder/` is written.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(folder / FINISHED):
        replace_json(
            folder / FINISHED, {"max_steps": max_steps, "identity_sha256": json_sha256(identity)}, None
        )


def identity_in(folder: Path) -> dict[str, Any] | None:
    """Returns what the run in the folder is made of. None if that is not known.

    For a run of version 0.1 only the recipe is known.

    Raises:
        UserError: run.json is damaged.
    """
    if (stored := identity_stored_in(folder)) is not None:
        return stored
    if (folder / RECIPE).is_file():
        return {"recipe": recipe_identity(load_recipe(folder / RECIPE)), "data": None, "model": None}
    return None


def changes_of_run(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """Says in words what differs from the run in the folder. Empty if nothing does, or if there is no run.

    Raises:
        UserError: as `identity_in`.
    """
    stored = identity_in(folder)
    return changes(stored, identity) if stored is not None else []


def another_run(folder: Path, changed: list[str]) -> UserError:
    further = ""
    if all(change.startswith(("max_steps", "epochs")) for change in changed):
        further = f" (to train on from its encoder: a new output_dir and model.path={folder})"
    return UserError(
        f"{folder} holds another run ({'; '.join(changed)}): undo the change, choose another output_dir"
        f"{further}, or pass overwrite=true without resume to start again"
    )
