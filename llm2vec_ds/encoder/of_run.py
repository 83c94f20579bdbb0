"""A run's folder stands for its encoder: is a folder one, has that run finished, and where is its encoder?

engine/run_folder.py says what a run's folder holds, and writes it.
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

RUN, RECIPE, METRICS, FINISHED = "run.json", "recipe.yaml", "metrics.jsonl", "finished"
CHECKPOINTS, ENCODER = "checkpoints", "encoder"
CONFIG = "config.json"


@dataclass(frozen=True)
class Identity:
    """See engine/identity.py; None: not known."""

    recipe: dict[str, Any]
    data: str | None
    model: str | None


@dataclass(frozen=True)
class Described:
    """What run.json holds."""

    format_version: int
    llm2vec_ds_version: str
    identity: Identity


def encoder_of(place: str) -> str:
    """A run's or a demo's folder stands for its `encoder/`; all else (a model's folder, a hub id) for itself.

    Raises:
        UserError: it is a run's that has not finished, or holds several runs.
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
    """The recipe whose `model.path`, and whatever else names a model, are encoders where they were runs.

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
    """Does the folder hold a run? Version 0.1 wrote no run.json."""
    if (folder / RUN).is_file() or any((folder / CHECKPOINTS).glob("step-*/manifest.json")):
        return True
    return (folder / RECIPE).is_file() and (folder / METRICS).is_file()


def is_finished(folder: Path) -> bool:
    """Is there an encoder of the very run that the folder describes?

    Raises:
        UserError: run.json is damaged.
    """
    try:
        mark = parse_json((folder / FINISHED).read_bytes())
    except (OSError, ValueError):
        return False
    if not (folder / ENCODER / CONFIG).is_file():
        return False
    if isinstance(mark, int):  # of version 0.1, which wrote the number of steps
        return not (folder / RUN).exists()
    stored = identity_stored_in(folder)
    return (
        isinstance(mark, dict) and stored is not None and mark.get("identity_sha256") == json_sha256(stored)
    )


def identity_stored_in(folder: Path) -> dict[str, Any] | None:
    """What run.json says that the run is made of; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not (folder / RUN).is_file():
        return None
    remedy = "restore it, choose another output_dir, or start again by overwrite=true"
    return asdict(read_json(folder / RUN, Described, remedy).identity)


def check_is_of_finished_run(model: Path) -> None:
    """A run's `encoder/` is used only when it is of that run.

    Args:
        model: any model's folder.

    Raises:
        UserError: it is the encoder of an earlier run, in the folder of one that has not finished.
    """
    run = model.parent
    if model.name == ENCODER and model.is_dir() and is_run(run) and not is_finished(run):
        raise UserError(
            f"{model} is not of the run in {run}, which has not finished: continue that run with resume=true"
        )
