"""Helpers to run a trunk for inference: without dropout, without autograd, and with little Python."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from llm2vec_ds.process.host_heap import freed_memory_is_kept

MANY_TOKENS = 2048
"""From this many tokens on, freed memory is kept. Fresh pages for each layer would take longer than giving
the memory back at the end."""


def has_part_in_training(module: nn.Module) -> bool:
    """Returns `any(part.training for part in module.modules())` in a tenth of the time."""
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
    """Returns inference mode, which records nothing for autograd. Under ZeRO-3 returns `no_grad`.

    ZeRO-3 fills its parameters in forward. Training could not change parameters filled in inference mode.
    """
    return torch.no_grad() if is_partitioned(trunk) else torch.inference_mode()


def is_partitioned(trunk: nn.Module) -> bool:
    """Says whether the trunk's parameters are partitioned among ranks (ZeRO-3)."""
    return hasattr(next(trunk.parameters()), "ds_id")


def kept_memory(device: torch.device, n_tokens: int) -> AbstractContextManager[None]:
    """Returns a context that keeps freed memory on a CPU. Each layer frees memory that the next one needs."""
    return freed_memory_is_kept() if device.type == "cpu" and n_tokens >= MANY_TOKENS else nullcontext()
