"""Says whether a folder holds a run, whether that run has finished, and where its encoder is.

A run's folder may be given in place of its encoder. engine/run_folder.py says what such a folder holds.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.fingerprint import json_sha256
from llm2vec_ds.storage.reading import parse_json, read_json

log = logging.getLogger(__name__)

RUN, RECIPE, FINISHED = "run.json", "recipe.yaml", "finished"
METRICS, HELD_OUT = "metrics.jsonl", "held_out.jsonl"
CHECKPOINTS, ENCODER = "checkpoints", "encoder"
CONFIG = "config.json"


@dataclass(frozen=True)
class Identity:
    """What a run is made of (see engine/identity.py). None stands for an unknown value."""

    recipe: dict[str, Any]
    data: str | None
    model: str | None


@dataclass(frozen=True)
class RunFile:
    """The content of run.json."""

    format_version: int
    llm2vec_ds_version: str
    identity: Identity


def encoder_of(place: str) -> str:
    """Returns the `encoder/` of a run's or a demo's folder. Another place (a model, a hub id) stays as it is.

    Raises:
        UserError: the run has not finished, or the folder holds several runs.
    """
    folder = Path(place)
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return place
    encoder = folder / ENCODER
    if not (encoder / CONFIG).is_file():
        if is_run(folder):
            raise UserError(
                f"{folder} is a run that has not finished, so it has no encoder: continue it with resume=true"
            )
        if several := sorted(str(found.parents[1]) for found in folder.glob(f"*/{ENCODER}/{CONFIG}")):
            raise UserError(f"{folder} holds several runs: choose one of {', '.join(several)}")
        return place
    check_is_of_finished_run(encoder)
    log.info("%s: its encoder, %s", folder, encoder)
    return str(encoder)


def with_encoders_of_runs(recipe: Recipe) -> Recipe:
    """Returns the recipe with runs replaced by their encoders in every key that names a model.

    Raises:
        UserError: as `encoder_of`.
    """
    model, own = recipe.model, recipe.objective
    places = {key: place for key in own.places if isinstance(place := getattr(own, key), str)}
    changes = {
        "model": model.model_copy(update={"path": encoder_of(model.path)}),
        recipe.stage: own.model_copy(update={key: encoder_of(place) for key, place in places.items()}),
    }
    return recipe.model_copy(update=changes)


def is_run(folder: Path) -> bool:
    """Says whether the folder holds a run. A run of version 0.1 has no run.json."""
    if (folder / RUN).is_file() or any((folder / CHECKPOINTS).glob("step-*/manifest.json")):
        return True
    return (folder / RECIPE).is_file() and (folder / METRICS).is_file()


def is_finished(folder: Path) -> bool:
    """Says whether the run that the folder describes has finished and its encoder is there.

    Raises:
        UserError: run.json is damaged.
    """
    try:
        mark = parse_json((folder / FINISHED).read_bytes())
    except (OSError, ValueError):
        return False
    if not (folder / ENCODER / CONFIG).is_file():
        return False
    if isinstance(mark, int):  # version 0.1 wrote only the number of steps
        return not (folder / RUN).exists()
    stored = identity_stored_in(folder)
    return (
        isinstance(mark, dict) and stored is not None and mark.get("identity_sha256") == json_sha256(stored)
    )


def identity_stored_in(folder: Path) -> dict[str, Any] | None:
    """Returns the identity of the run in run.json. None if there is no run.json.

    Raises:
        UserError: run.json is damaged.
    """
    if not (folder / RUN).is_file():
        return None
    remedy = "restore it, choose another output_dir, or start again with overwrite=true"
    return asdict(read_json(folder / RUN, RunFile, remedy).identity)


def check_is_of_finished_run(model: Path) -> None:
    """Refuses a run's `encoder/` if it does not belong to that run.

    Args:
        model: the folder of any model.

    Raises:
        UserError: the run has not finished, and the encoder in its folder is that of an earlier run.
    """
    run = model.parent
    if model.name == ENCODER and model.is_dir() and is_run(run) and not is_finished(run):
        raise UserError(
            f"{model} does not belong to the run in {run}, which has not finished: continue that run with "
            "resume=true"
        )


def short_name(model: str) -> str:
    """Returns a short name of a model. For the `encoder/` of a run it is the run's name."""
    path = Path(model)
    return path.absolute().parent.name if path.name == "encoder" else path.absolute().name
