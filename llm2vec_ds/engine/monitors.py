"""DeepSpeed's monitors, which get the metrics beside metrics.jsonl, and the W&B run that they write to."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm2vec_ds.distributed import on_first_rank, rank
from llm2vec_ds.engine.run_folder import MONITOR, WANDB_RUN_ID
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.process.environment import set_variables
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.durable import replace_text

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
WANDB_PROJECT = "llm2vec-ds"


def monitor_sections(recipe: Recipe) -> dict[str, Any]:
    """Returns DeepSpeed's sections for the monitors that the recipe asks for.

    Raises:
        UserError: a monitor needs a package that is not installed.
    """
    for name in recipe.monitor:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"monitor {name} needs the package {PACKAGES[name]}: pip install 'llm2vec-ds[monitor]'"
            )
    files = {"enabled": True, "output_path": str(Path(recipe.output_dir) / MONITOR)}
    # DeepSpeed passes the project to wandb, where it overrides the variable. So the variable is read here.
    project = os.environ.get("WANDB_PROJECT", WANDB_PROJECT)
    sections: dict[str, dict[str, Any]] = {
        "tensorboard": {**files, "job_name": "tensorboard"},
        "csv": {**files, "job_name": "csv"},
        "wandb": {"enabled": True, "project": project, "group": Path(recipe.output_dir).name},
    }
    return {"csv_monitor" if name == "csv" else name: sections[name] for name in recipe.monitor}


@contextmanager
def wandb_run(recipe: Recipe, folder: Path) -> Iterator[None]:
    """In this context DeepSpeed starts the W&B run of this run, or continues it.

    The W&B run has the name of the run's folder. Its id is kept in that folder. Variables of wandb that the
    user has set stay as they are. All ranks enter together.

    Raises:
        UserError: the id cannot be written.
    """
    if "wandb" not in recipe.monitor:
        yield
        return
    run_id = on_first_rank(lambda: _stored_id(folder))
    values = {
        "WANDB_NAME": folder.resolve().name,
        "WANDB_DIR": str(folder / MONITOR),
        "WANDB_RUN_ID": run_id,
        "WANDB_RESUME": "allow",
    }
    own = {name: value for name, value in values.items() if name not in os.environ}
    if rank() == 0:
        set_variables(own, "wandb")
    failed = 1
    try:
        yield
        failed = 0
    finally:
        # Another stage may follow in this process, with a W&B run of its own.
        if rank() == 0:
            if (wandb := sys.modules.get("wandb")) is not None:
                wandb.finish(exit_code=failed)
            for name in own:
                del os.environ[name]


def _stored_id(folder: Path) -> str:
    file = folder / MONITOR / WANDB_RUN_ID
    with writing(file):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            replace_text(file, f"{secrets.token_hex(4)}\n")
        return file.read_text(encoding="utf-8").strip()
