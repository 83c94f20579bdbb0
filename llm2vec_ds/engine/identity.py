"""What a run is made of: recipe, data, model. A checkpoint of another run is not gone on from unnoticed."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from llm2vec_kernels.products import cpu_products

from llm2vec_ds.distributed import world_size
from llm2vec_ds.model.fingerprint import model_fingerprint
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
    "evaluation",
    "machine",
    "batch.micro_batch_tokens",
    "batch.halve_if_out_of_memory",
)
"""Recipe keys that may differ on resume: where things lie and how ranks share the work. Data and model are
known by what they hold, wherever they lie."""

PACKAGES = ("llm2vec-ds", "torch", "transformers", "deepspeed", "peft", "tokenizers", "numpy")


def identity_of(recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """`recipe` (flat, dotted keys), `data` and `model` (fingerprints). JSON can hold it."""
    model = model_fingerprint(recipe.model.path)
    return {"recipe": recipe_identity(recipe), "data": data_fingerprint, "model": model}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Flat, with dotted keys, without `FREE_KEYS` and the objective's places."""
    values = _flat(recipe.model_dump(mode="json"))
    # `epochs` and the data say how many steps there are.
    free = (
        *FREE_KEYS,
        *(["max_steps"] if recipe.epochs is not None else []),
        *(f"{recipe.stage}.{key}" for key in recipe.objective.places),
    )
    return {k: v for k, v in values.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words: recipe keys with both values, then data and model where both are known.

    A key that one of them lacks has its default there: versions add keys.
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
    """Versions, commit, ranks, threads and token budget: what bit-equal losses need to be the same."""
    return {
        "micro_batch_tokens": recipe.batch.micro_batch_tokens,
        "fused_layers": recipe.model.fused_layers,
        "deepspeed": recipe.deepspeed,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the toolkit's own checkout; None where it was installed without one."""
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
