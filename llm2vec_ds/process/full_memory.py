"""Recognises errors of a full memory, of a GPU or of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm2vec_ds.errors import UserError

GPU, MACHINE = "the GPU's memory", "this machine's memory"

# Errors of CUDA and its libraries, which do not use torch's allocator. Then errors of the host.
_OF_A_GPU = re.compile(r"CUDA( error:)? out of memory|CU\w+_STATUS_ALLOC_FAILED")
_OF_THE_MACHINE = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory"
)


def full_memory(error: BaseException) -> str | None:
    """Returns which memory the error calls full: GPU or MACHINE. None for any other error."""
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
    """Turns an error of full memory inside into a user error.

    Args:
        remedy: what the user should lower.

    Raises:
        UserError: memory is full.
    """
    try:
        yield
    except Exception as error:
        which = full_memory(error)
        if which is None:
            raise
        raise UserError(f"{which} is full: {remedy}") from None
