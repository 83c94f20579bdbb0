"""Decides how many texts go through a trunk at once, and overlaps the work around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from llm2vec_ds.process.full_memory import full_memory

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

CPU_TOKENS, GPU_TOKENS = 4096, 32_768
"""Tokens of one pass. An H200 encodes three to four times as fast with 32,768 tokens as with 4,096
(docs/performance.md). More was not measured."""


def tokens_of_a_pass(device: torch.device, asked: int | None = None) -> int:
    """Returns the number of tokens that was asked for. Without it, returns what suits the device."""
    if asked is not None:
        return asked
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def lower_pass(asked: int | None) -> str:
    """Says what to do if memory is full."""
    return f"lower --micro-batch-tokens (now {asked})" if asked else "give a small --micro-batch-tokens"


class HalvedWhereFull:
    """Runs groups of texts. If memory is full, halves the group, and all later groups that are too large.

    Args:
        run: takes a trunk and the numbers of some texts. Returns a tensor with a row for each text.
        lengths: tokens of every text.
    """

    def __init__(self, run: Callable[[Any, np.ndarray], torch.Tensor], lengths: Sequence[int]) -> None:
        self._run = run
        self._lengths = np.asarray(lengths)
        self._most: float = math.inf

    def __call__(self, trunk: Any, group: np.ndarray) -> torch.Tensor:
        n_tokens = int(self._lengths[group].sum())
        if len(group) == 1 or n_tokens <= self._most:
            try:
                return self._run(trunk, group)
            except Exception as error:
                which = full_memory(error)
                if len(group) == 1 or which is None:
                    raise
            # The error holds the tensors of the failed pass. It is gone after the `except` block, so the
            # cache can be emptied only here.
            self._most = n_tokens / 2
            log.warning("%s is full: passes of at most %.0f tokens from here on", which, self._most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(group) // 2
        return torch.cat([self(trunk, group[:half]), self(trunk, group[half:])])


def one_ahead(items: Iterable[A]) -> Iterator[A]:
    """Yields each item once the next one has been made.

    Making an item only starts work on the GPU. So the GPU already has the next item's work while the caller
    waits for this one.
    """
    waiting: list[A] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def made_ahead(make: Callable[[A], B], items: Iterable[A], device: torch.device) -> Iterator[tuple[A, B]]:
    """Yields `(item, make(item))`.

    For a GPU, a thread makes the next one meanwhile. So one more item is read ahead. An error of `make` is
    raised when its item would be yielded.
    """
    if device.type == "cpu":
        yield from ((item, make(item)) for item in items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        begun = ((item, thread.submit(make, item)) for item in items)
        for item, future in one_ahead(begun):
            yield item, future.result()
