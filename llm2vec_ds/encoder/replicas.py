"""Cuts a stream of texts into blocks, and runs one model on several devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
from torch import nn

from llm2vec_ds.distributed import ranks_from_environment

TEXTS_PER_BLOCK = 4096
CHARACTERS_PER_BLOCK = 2**24

Device = torch.device | str
T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def text_blocks(texts: Iterable[T], first_row: int = 0) -> Iterator[tuple[int, list[T]]]:
    """Yields blocks of `texts` in order, each with the row of its first text.

    A block ends after TEXTS_PER_BLOCK texts, or when it reaches CHARACTERS_PER_BLOCK characters. `first_row`
    is the row of the very first text.
    """
    block: list[T] = []
    n_characters = 0
    for text in texts:
        block.append(text)
        n_characters += len(text) if isinstance(text, str) else 0
        if len(block) == TEXTS_PER_BLOCK or n_characters >= CHARACTERS_PER_BLOCK:
            yield first_row, block
            first_row += len(block)
            block, n_characters = [], 0
    if block:
        yield first_row, block


def devices(chosen: Device | Sequence[Device] | None) -> list[torch.device]:
    """Returns the chosen devices. None: every GPU, or this rank's GPU under a launcher, or else the CPU."""
    if chosen is not None:
        return [torch.device(d) for d in ([chosen] if isinstance(chosen, Device) else chosen)]
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus == 0:
        return [torch.device("cpu")]
    ranks = ranks_from_environment()
    if ranks.world_size > 1:
        return [torch.device("cuda", ranks.local_rank % n_gpus)]
    return [torch.device("cuda", index) for index in range(n_gpus)]


class Replicas(Generic[M]):
    """A module and its copies, one for each device. Later changes of the weights do not reach the copies."""

    def __init__(self, module: M, devices: Sequence[torch.device]) -> None:
        first, *others = devices
        self._modules = [module.to(first), *(copy.deepcopy(module).to(device) for device in others)]

    def map(self, function: Callable[[M, T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields `function(module, item)` for each item, in order.

        Each device takes the next item when it is free. Threads are enough, because the work that takes time
        runs outside of Python.
        """
        free: SimpleQueue[M] = SimpleQueue()
        for module in self._modules:
            free.put(module)

        def work(item: T) -> R:
            module = free.get()
            try:
                return function(module, item)
            finally:
                free.put(module)

        with ThreadPoolExecutor(max_workers=len(self._modules)) as pool:
            yield from pool.map(work, items)
