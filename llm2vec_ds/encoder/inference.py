"""A trunk that only computes: without dropout, without notes for autograd, and with little Python."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from llm2vec_ds.process.host_heap import freed_memory_is_kept

MANY_TOKENS = 2048
"""From so many on, fresh pages for each layer take longer than giving the memory back at the end."""


def has_part_in_training(module: nn.Module) -> bool:
    """`any(part.training for part in module.modules())`, in a tenth of the time."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if part.training:
            return True
        waiting.extend(part._modules.values())
    return False


def device_of(trunk: nn.Module) -> torch.device:
    return next(trunk.parameters()).device


def no_graph(trunk: nn.Module) -> torch.inference_mode | torch.no_grad:
    """Inference mode, which keeps no notes for autograd at all; under ZeRO-3 `no_grad`.

    ZeRO-3 fills its parameters in forward. Training could not change those that inference mode has filled.
    """
    return torch.no_grad() if is_partitioned(trunk) else torch.inference_mode()


def is_partitioned(trunk: nn.Module) -> bool:
    """Are its parameters shared among ranks (ZeRO-3)?"""
    return hasattr(next(trunk.parameters()), "ds_id")


def kept_memory(device: torch.device, n_tokens: int) -> AbstractContextManager[None]:
    """For a CPU's layers, each of which frees what the next one needs again."""
    return freed_memory_is_kept() if device.type == "cpu" and n_tokens >= MANY_TOKENS else nullcontext()
