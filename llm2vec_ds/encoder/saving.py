"""Writes a trunk's weights and config.json into a folder, as transformers reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llm2vec_ds.model.adapters import merged_state_dict

LARGEST_FILE = "4GB"
"""The largest file of weights. While a GPU's weights are written, the host holds this much at a time."""


def save_trunk(trunk: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes weights and config.json.

    Args:
        state_dict: the weights, if they differ from the live ones (merged adapters).

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    try:
        if getattr(trunk, "is_loaded_in_4bit", False):
            _save_dequantized(trunk, folder, state_dict)
        else:
            trunk.save_pretrained(folder, state_dict=state_dict, max_shard_size=LARGEST_FILE)
    except SafetensorError as error:  # safetensors wraps the system's error, such as a full disk
        number = re.search(r"os error (\d+)", str(error))
        reason = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
        raise OSError(*reason) from None
    # Only the owner can read files that safetensors writes. They get the permissions of config.json.
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def _save_dequantized(trunk: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Writes a plain checkpoint. transformers itself would write the 4-bit settings into config.json."""
    from huggingface_hub import save_torch_state_dict

    config = type(trunk.config).from_dict(trunk.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(trunk).__name__]
    config.save_pretrained(folder)
    save_torch_state_dict(state_dict or merged_state_dict(trunk), folder, max_shard_size=LARGEST_FILE)
