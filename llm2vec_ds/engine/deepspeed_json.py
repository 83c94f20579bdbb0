"""The DeepSpeed JSON that a recipe names: reading and checking it needs no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2vec_ds.errors import UserError

OWNED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)


def read_json(path: str | Path) -> dict[str, Any]:
    """The file's object, without keys that begin with `_`.

    Raises:
        UserError: the file is missing, no JSON object, or holds "auto" where it would be dropped silently.
    """
    if not Path(path).is_file():
        raise UserError(f"DeepSpeed config {path} not found: see ds_configs/ for ready ones")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed config {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} must be a JSON object")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if key := _auto_key({k: v for k, v in config.items() if k not in OWNED_BY_RECIPE}):
        raise UserError(f'DeepSpeed config {path}: `{key}` is "auto", give a value (or leave the key out)')
    return config


def _auto_key(value: Any, prefix: str = "") -> str | None:
    if isinstance(value, dict):
        found = (_auto_key(child, f"{prefix}.{key}" if prefix else key) for key, child in value.items())
        return next((key for key in found if key), None)
    return prefix if value == "auto" else None
