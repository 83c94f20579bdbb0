"""Errors that say that memory is full, of a GPU or of the machine: told apart from others in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm2vec_ds.errors import UserError

GPU, MACHINE = "the GPU's memory", "this machine's memory"

# Of CUDA itself and of its libraries, which do not go through torch's allocator; of torch's on the host.
_OF_A_GPU = re.compile(r"CUDA( error:)? out of memory|CU\w+_STATUS_ALLOC_FAILED")
_OF_THE_MACHINE = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory"
)


def full_memory(error: BaseException) -> str | None:
    """GPU or MACHINE, whichever memory the error calls full; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return GPU
    if isinstance(error, MemoryError):
        return MACHINE
    if isinstance(error, (RuntimeError, OSError)):
        if _OF_A_GPU.search(str(error)):
            return GPU
        if _OF_THE_MACHINE.search(str(error)):
            return MACHINE
    return None


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Around work that may fill memory; `remedy` says what to lower.

    Raises:
        UserError: in place of an error of a full memory.
    """
    try:
        yield
    except Exception as error:
        which = full_memory(error)
        if which is None:
            raise
        raise UserError(f"{which} is full: {remedy}") from None
