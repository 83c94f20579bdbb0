"""Finds out whether a run has already finished, and which checkpoint it resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llm2vec_ds.distributed import on_first_rank
from llm2vec_ds.encoder.of_run import is_finished
from llm2vec_ds.engine.build import prepared_groups, rows_of, tokenizer_of
from llm2vec_ds.engine.checkpoint import Checkpoint, CheckpointStore
from llm2vec_ds.engine.identity import changes, identity_of, made_by
from llm2vec_ds.engine.run_folder import another_run, changes_of_run
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.registry import objective_of
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Says whether this same run has finished. All ranks call it together.

    Raises:
        UserError: the recipe asks to resume, but the finished run is another one.
    """
    if not on_first_rank(lambda: bool(recipe.resume) and is_finished(folder)):
        return False
    objective = objective_of(recipe)
    data = rows_of(recipe, prepared_groups(recipe, tokenizer_of(recipe))[0])

    def differences() -> list[str]:
        fingerprint = objective.data_fingerprint(recipe, data)
        return changes_of_run(folder, identity_of(recipe, fingerprint))

    changed = on_first_rank(differences)
    if changed and recipe.resume != "force":
        raise another_run(folder, changed)
    return not changed


def checkpoint_to_resume(
    recipe: Recipe, folder: Path, store: CheckpointStore, identity: dict[str, Any]
) -> Checkpoint | None:
    """Returns the newest valid checkpoint if the recipe asks to resume. None: the run starts at step 1.

    Raises:
        UserError: the checkpoint belongs to another run. Or there is none, and the folder holds another run.
    """
    store.clear_unfinished()
    if not recipe.resume:
        return None
    checkpoint = store.newest_valid()
    if checkpoint is None:
        if changed := changes_of_run(folder, identity):
            raise another_run(folder, changed)
        log.info("no checkpoint in %s yet: starting at step 1", store.folder)
        return None
    manifest = checkpoint.manifest
    if changed := changes(manifest.identity, identity):
        words = "; ".join(changed)
        if recipe.resume != "force":
            raise UserError(
                f"{checkpoint.folder} is of another run ({words}): undo the change, pass resume=force to "
                "continue anyway, or pass overwrite=true without resume to start again"
            )
        log.warning("resume=force: going on although %s", words)
    now = made_by(recipe)
    before = {key: value for key, value in manifest.made_by.items() if key in now}
    if moved := [f"{key} {value} → {now[key]}" for key, value in before.items() if value != now[key]]:
        log.warning("losses may differ in their last digits, or in dropout: %s", ", ".join(moved))
    log.info("going on from %s", checkpoint.folder)
    return checkpoint
