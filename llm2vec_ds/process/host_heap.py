"""What glibc's allocator does with freed memory (elsewhere nothing is changed).

By itself it gives large blocks back to the system when they are freed, and takes fresh pages, zeroed one by
one, for the next ones: a fifth of a training step on a CPU whose micro-batch holds thousands of tokens.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_GLIBC_MMAP_THRESHOLD = 2**25  # the most to which glibc raises it by itself, to the largest block freed
_GLIBC_MMAP_MAX = 2**16
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Blocks of 1 MiB or more go back to the system when they are freed: for work whose parts stay.

    Whole tensors would otherwise come from the heap, between parts that stay, and a rank's memory grow to
    that of the whole model while it loads its part. The environment's own settings are left alone.
    """
    if _own_settings():
        yield
        return
    _mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, _GLIBC_MMAP_THRESHOLD)


class _Uses:
    """How many uses of `freed_memory_is_kept` are going on: the allocator is one for the whole process."""

    def __init__(self) -> None:
        self.lock, self.number = Lock(), 0


_uses = _Uses()


@contextmanager
def freed_memory_is_kept(log_level: int = logging.DEBUG) -> Iterator[None]:
    """Freed blocks stay with the process, for the next step to take, as PyTorch's CUDA allocator keeps them.

    One use may lie inside another, as encoding inside training. Left as it is where the environment has
    its own settings (`MALLOC_TRIM_THRESHOLD_` and the like).
    """
    if own := _own_settings():
        log.log(log_level, "freed memory goes where %s says", ", ".join(own))
        yield
        return
    with _uses.lock:
        _uses.number += 1
        if _uses.number == 1:
            _mallopt(_MMAP_MAX, 0)
            _mallopt(_TRIM_THRESHOLD, _NEVER)
            log.log(log_level, "freed memory is kept for the next step")
    try:
        yield
    finally:
        with _uses.lock:
            _uses.number -= 1
            if not _uses.number:
                _as_glibc_does()


def _as_glibc_does() -> None:
    _mallopt(_MMAP_MAX, _GLIBC_MMAP_MAX)
    _mallopt(_MMAP_THRESHOLD, _GLIBC_MMAP_THRESHOLD)
    _mallopt(_TRIM_THRESHOLD, 2 * _GLIBC_MMAP_THRESHOLD)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _own_settings() -> list[str]:
    return [name for name in _SETTINGS if name in os.environ]


def _mallopt(which: int, value: int) -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(which, value)
