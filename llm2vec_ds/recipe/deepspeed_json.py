"""Reads and checks the DeepSpeed JSON that a recipe names. This needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import checked_json

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
    """Returns the file's object, without keys that begin with `_`.

    Raises:
        UserError: the file is missing or holds no JSON object, or one of its sections is no object. Or it has
            an "auto" that the recipe does not replace.
    """
    if not Path(path).is_file():
        raise UserError(f"DeepSpeed config {path} not found: see ds_configs/ for ready ones")
    try:
        config = checked_json(Path(path).read_bytes(), dict[str, Any])
    except ValueError as error:
        raise UserError(f"DeepSpeed config {path} must be a JSON object: {error}") from None
    _check_sections(path, config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if key := _auto_key({k: v for k, v in config.items() if k not in OWNED_BY_RECIPE}):
        raise UserError(f'DeepSpeed config {path}: `{key}` is "auto": give a value, or leave the key out')
    return config


def _check_sections(path: str | Path, config: dict[str, Any]) -> None:
    """Checks that the sections which this package reads are objects, and that the ZeRO stage is known."""
    zero = config.get("zero_optimization", {})
    offloads = ("offload_optimizer", "offload_param")
    inner = (
        {f"zero_optimization.{key}": zero.get(key) or {} for key in offloads}
        if isinstance(zero, dict)
        else {}
    )
    for key, section in {"zero_optimization": zero, **inner}.items():
        if not isinstance(section, dict):
            raise UserError(f"DeepSpeed config {path}: `{key}` must be an object, not {section!r}")
    stage = zero.get("stage", 0)  # "auto" has an answer of its own
    if stage != "auto" and (stage not in (0, 1, 2, 3) or not isinstance(stage, int)):
        raise UserError(
            f"DeepSpeed config {path}: `zero_optimization.stage` is {stage!r}: write 0, 1, 2 or 3"
        )


def _auto_key(value: Any, prefix: str = "") -> str | None:
    if isinstance(value, dict):
        found = (_auto_key(child, f"{prefix}.{key}" if prefix else key) for key, child in value.items())
        return next((key for key in found if key), None)
    return prefix if value == "auto" else None


def optimizer_is_offloaded(config: Mapping[str, Any]) -> bool:
    """Returns whether this JSON keeps the optimizer's states on the host."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def parameters_are_offloaded(config: Mapping[str, Any]) -> bool:
    """Returns whether this JSON keeps the weights on the host."""
    offload = config.get("zero_optimization", {}).get("offload_param") or {}
    return bool(offload.get("device", "none") != "none")
