"""The identity of a run: its recipe, data and model.

A run resumes only from a checkpoint of the same identity, unless the user forces it.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from llm2vec_kernels.products import cpu_products

from llm2vec_ds.distributed import world_size
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.process.versions import versions_of
from llm2vec_ds.recipe.keys import default_of
from llm2vec_ds.recipe.recipe import Recipe, recipe_class

FREE_KEYS = (
    "output_dir",
    "overwrite",
    "resume",
    "checkpoint",
    "monitor",
    "step_timeout_s",
    "held_out_every_steps",
    "evaluation",
    "data.prepared_dir",
    "data.path",
    "data.held_out_path",
    "model.path",
    "model.config_file",
    "model.activation_checkpointing",
    "model.fused_layers",
    "model.cuda_graphs",
    "deepspeed",
    "machine",
    "batch.micro_batch_tokens",
    "batch.halve_if_out_of_memory",
)
"""Recipe keys that may differ on resume. They say where things lie and how ranks share the work.

Data and model may be moved: they are compared by their content, not by their paths.
"""

PACKAGES = ("llm2vec-ds", "torch", "transformers", "deepspeed", "peft", "tokenizers", "numpy")


def identity_of(recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """Returns `recipe` (flat, with dotted keys), and the fingerprints `data` and `model`, ready for JSON."""
    model = model_fingerprint(recipe.model.path)
    return {"recipe": recipe_identity(recipe), "data": data_fingerprint, "model": model}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe's keys that must not change: flat and dotted, without `FREE_KEYS` and paths."""
    values = _flat(recipe.model_dump(mode="json"))
    # With `epochs`, the number of steps follows from `epochs` and the data.
    free = (
        *FREE_KEYS,
        *(["max_steps"] if recipe.epochs is not None else []),
        *(f"{recipe.stage}.{key}" for key in recipe.objective.places),
    )
    return {k: v for k, v in values.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says in words what differs: recipe keys with both values, then data and model if both are known.

    A later version may add keys. So a key that one side lacks has its default there.
    """
    root = recipe_class(now["recipe"]["stage"])

    def value(part: Mapping[str, Any], key: str) -> Any:
        return part["recipe"].get(key, default_of(key, root))

    keys = [
        key for key in sorted({*before["recipe"], *now["recipe"]}) if value(before, key) != value(now, key)
    ]
    found = [f"{key} was {_shown(value(before, key))}, now {_shown(value(now, key))}" for key in keys]
    for part, words in (
        ("data", "the training data have changed"),
        ("model", "the model to start from has changed"),
    ):
        if None not in (before[part], now[part]) and before[part] != now[part]:
            found.append(words)
    return found


def _shown(value: Any) -> Any:
    return "not set" if value is None else value


def made_by(recipe: Recipe) -> dict[str, Any]:
    """Returns versions, commit, ranks, threads and token budget.

    Losses are equal to the bit only if these are the same.
    """
    return {
        "micro_batch_tokens": recipe.batch.micro_batch_tokens,
        "fused_layers": recipe.model.fused_layers,
        "deepspeed": recipe.deepspeed,
        "versions": versions_of(PACKAGES),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "world_size": world_size(),
        "n_threads": torch.get_num_threads(),
        "device": _device(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, products by {cpu_products().name}"


def _git_commit() -> str | None:
    """Returns the commit of the toolkit's own checkout. None if it was installed without one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        line = ["git", "-C", str(here), "rev-parse", "HEAD"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
