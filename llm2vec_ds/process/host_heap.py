"""Changes what glibc's allocator does with freed memory. Other systems stay as they are.

By default glibc returns large freed blocks to the system. For the next blocks it gets new pages, which the
system zeroes one by one. On a CPU with thousands of tokens per micro-batch this takes a fifth of a training
step.
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
_GLIBC_MMAP_THRESHOLD = 2**25  # glibc raises it to the largest freed block, up to this
_GLIBC_MMAP_MAX = 2**16
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Inside, freed blocks of 1 MiB or more go back to the system.

    This is for a rank that loads whole tensors and keeps a part of each. Otherwise whole tensors would come
    from the heap, between parts that stay. The rank's memory would then grow to that of the whole model. If
    the environment has its own allocator settings, nothing changes.
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
    """Counts the open uses of `freed_memory_is_kept`. The whole process has only one allocator."""

    def __init__(self) -> None:
        self.lock, self.number = Lock(), 0


_uses = _Uses()


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Inside, the process keeps freed blocks for the next step, as PyTorch's CUDA allocator does.

    Uses can be nested, such as encoding inside training. If the environment has its own allocator settings
    (`MALLOC_TRIM_THRESHOLD_` and similar), nothing changes.
    """
    if own := _own_settings():
        log.debug("freed memory: as %s says", ", ".join(own))
        yield
        return
    with _uses.lock:
        _uses.number += 1
        if _uses.number == 1:
            _mallopt(_MMAP_MAX, 0)
            _mallopt(_TRIM_THRESHOLD, _NEVER)
            log.debug("freed memory is kept for the next step")
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
