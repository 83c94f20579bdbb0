"""Which text goes to which step and rank: a pure function, so nothing about data order is ever stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from llm2vec_ds.errors import UserError


class GlobalBatches(Protocol):
    """Rows of each step over all ranks, a pure function of data, seed and step."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of all sources."""

    def __call__(self, step: int) -> np.ndarray:
        """Rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""


@dataclass(frozen=True)
class EpochBatches:
    """Batches of one source: each epoch is a new permutation of its rows, cut into whole batches.

    The `n_rows % global_batch_size` rows at an epoch's end sit out, others each time. A batch never holds
    a row twice.

    Raises:
        UserError: there are fewer rows than a batch takes.
    """

    n_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_rows < self.global_batch_size:
            raise UserError(
                f"{self.n_rows} texts do not fill one batch of {self.global_batch_size}: "
                "lower batch.global_batch_size or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_rows // self.global_batch_size

    def __call__(self, step: int) -> np.ndarray:
        """Rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self.n_rows, self.seed, epoch)
        return order[position * self.global_batch_size :][: self.global_batch_size]


@dataclass(frozen=True)
class SourceBatches:
    """Batches of one source each, so that in-batch negatives are of one kind.

    A step's source is drawn with probability ∝ (number of its batches)^(1/temperature); each source goes
    through epochs of its own, as in `EpochBatches`. Rows are numbered through all sources, in order. A
    source that does not fill a batch is never drawn.

    Raises:
        UserError: no source fills a batch.
    """

    source_sizes: tuple[int, ...]
    global_batch_size: int
    seed: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        largest = max(self.source_sizes, default=0)
        if largest < self.global_batch_size:
            raise UserError(
                f"no source fills one batch of {self.global_batch_size}, the largest has {largest} examples: "
                "lower batch.global_batch_size or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """On average: which source comes when is drawn, and by `temperature` 1 each in proportion."""
        return sum(size // self.global_batch_size for size in self.source_sizes)

    def __call__(self, step: int) -> np.ndarray:
        """Rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""
        drawn = self._sources(step + 1)
        source = int(drawn[step])
        turn = int((drawn[:step] == source).sum())
        own = EpochBatches(self.source_sizes[source], self.global_batch_size, self.seed + source)
        return own(turn) + sum(self.source_sizes[:source])

    def _sources(self, n_steps: int) -> np.ndarray:
        n_batches = np.asarray(self.source_sizes) // self.global_batch_size
        share = np.where(n_batches > 0, n_batches, 0) ** (1 / self.temperature)
        edges = np.cumsum(share / share.sum())
        # A stream's beginning does not depend on how much of it is drawn; powers of two make few lengths.
        uniform = _uniform(self.seed, 1 << (n_steps - 1).bit_length())[:n_steps]
        return np.minimum(np.searchsorted(edges, uniform, side="right"), len(edges) - 1)


def rank_slice(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous part of a global batch; parts are disjoint and differ by one row at most."""
    return np.array_split(rows, world_size)[rank]


@lru_cache(maxsize=8)
def _permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n_rows)


@lru_cache(maxsize=2)
def _uniform(seed: int, n: int) -> np.ndarray:
    key = np.random.SeedSequence(seed, spawn_key=(1,))  # never the key of a permutation
    return np.random.Generator(np.random.Philox(key)).random(n)
