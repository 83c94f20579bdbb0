"""Fits this machine's speed to its finished runs, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from llm2vec_ds.encoder.of_run import METRICS, RECIPE
from llm2vec_ds.errors import UserError
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.planner.step_time import Fit, Work, fit_speed
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.sections import MachineConfig
from llm2vec_ds.storage.reading import read_json, read_json_lines

WARM_UP_STEPS = 1


@dataclass(frozen=True)
class _Memory:
    """The part of memory.json that is needed here."""

    n_ranks: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class _Step:
    """The part of a line of metrics.jsonl that is needed here."""

    n_tokens: Annotated[int, Field(ge=1)]
    step_ms: Annotated[float, Field(gt=0)]


def measured_speed(folders: Sequence[Path], device: torch.device) -> Fit:
    """Fits the time of a step to the steps of finished runs. It leaves out the first step of each run.

    Args:
        folders: folders of runs, with recipe.yaml, metrics.jsonl and memory.json.
        device: the device that they ran on.

    Raises:
        UserError: a folder does not hold a run, or its run is too short.
    """
    return fit_speed([_steps(folder, device) for folder in folders])


def _steps(folder: Path, device: torch.device) -> list[tuple[Work, float]]:
    for name in (RECIPE, METRICS, "memory.json"):
        if not (folder / name).is_file():
            raise UserError(f"--measured {folder} has no {name}: give the folder of a finished run")
    n_ranks = read_json(folder / "memory.json", _Memory, "run it again").n_ranks
    if n_ranks is None:
        raise UserError(f"--measured {folder}: memory.json has no n_ranks: run it again")
    gpus = n_ranks if device.type == "cuda" else 0
    machine = MachineConfig(nodes=1 if gpus else n_ranks, gpus_per_node=gpus)
    planner = Planner(load_recipe(folder / RECIPE), folder / RECIPE, machine)
    steps = list(read_json_lines(folder / METRICS, _Step, "run it again"))[WARM_UP_STEPS:]
    if not steps:
        raise UserError(
            f"--measured {folder} has no step after the first, which is a warm-up: give a longer run"
        )
    return [(planner.work(step.n_tokens / n_ranks), step.step_ms / 1e3) for step in steps]
