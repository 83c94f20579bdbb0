"""Speed of this machine from runs that it has done: their metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from llm2vec_ds.config import MachineConfig
from llm2vec_ds.errors import UserError
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.planner.step_time import Fit, Work, fit_speed
from llm2vec_ds.recipe_file import load_recipe

WARM_UP_STEPS = 1


def measured_speed(folders: Sequence[Path], device: torch.device) -> Fit:
    """Fits the time of a step to all steps of finished runs but each one's first.

    Args:
        folders: of runs, with recipe.yaml, metrics.jsonl and memory.json.
        device: what they ran on.

    Raises:
        UserError: a folder is no run's, or its run is too short.
    """
    return fit_speed([_steps(folder, device) for folder in folders])


def _steps(folder: Path, device: torch.device) -> list[tuple[Work, float]]:
    for name in ("recipe.yaml", "metrics.jsonl", "memory.json"):
        if not (folder / name).is_file():
            raise UserError(f"measured {folder}: there is no {name}, give the folder of a finished run")
    n_ranks = json.loads((folder / "memory.json").read_text()).get("n_ranks")
    if n_ranks is None:
        raise UserError(f"measured {folder}: memory.json does not say n_ranks, run it again")
    gpus = n_ranks if device.type == "cuda" else 0
    machine = MachineConfig(nodes=1 if gpus else n_ranks, gpus_per_node=gpus)
    planner = Planner(load_recipe(folder / "recipe.yaml"), folder / "recipe.yaml", machine)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_ms" in row][WARM_UP_STEPS:]
    if not steps:
        raise UserError(f"measured {folder}: its run has no step after the first, which warms up")
    return [(planner.work(row["n_tokens"] / n_ranks), row["step_ms"] / 1e3) for row in steps]
