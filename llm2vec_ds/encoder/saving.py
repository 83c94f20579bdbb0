"""A trunk's weights and config.json in a folder, as transformers reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llm2vec_ds.model.adapters import merged_state_dict

LARGEST_FILE = "4GB"
"""Of an encoder's weights; so much of a GPU's weights is on the host at once while they are written."""


def save_trunk(trunk: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Args: state_dict: the weights, if they differ from the live ones (merged adapters).

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    try:
        if getattr(trunk, "is_loaded_in_4bit", False):
            _save_dequantized(trunk, folder, state_dict)
        else:
            trunk.save_pretrained(folder, state_dict=state_dict, max_shard_size=LARGEST_FILE)
    except SafetensorError as error:  # its name for what the system said
        number = re.search(r"os error (\d+)", str(error))
        reason = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
        raise OSError(*reason) from None
    for weights in folder.glob("*.safetensors"):  # which come readable to their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)


def _save_dequantized(trunk: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """A plain checkpoint: transformers would write the 4-bit settings into config.json."""
    from huggingface_hub import save_torch_state_dict

    config = type(trunk.config).from_dict(trunk.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(trunk).__name__]
    config.save_pretrained(folder)
    save_torch_state_dict(state_dict or merged_state_dict(trunk), folder, max_shard_size=LARGEST_FILE)
