"""Which text goes to which step and rank: a pure function, so nothing about data order is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
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
        position = step % self.steps_per_epoch
        order = _permutation(self.n_rows, self.seed, self.epoch_of(step))
        return order[position * self.global_batch_size :][: self.global_batch_size]

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch


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
        source, turn = self.source_of(step)
        return self.of_source(source)(turn) + sum(self.source_sizes[:source])

    def source_of(self, step: int) -> tuple[int, int]:
        """The source of a step, and how many steps before it were of that source."""
        drawn = self._sources(step + 1)
        source = int(drawn[step])
        return source, int((drawn[:step] == source).sum())

    def of_source(self, source: int) -> EpochBatches:
        """Its rows are counted from 0."""
        return EpochBatches(self.source_sizes[source], self.global_batch_size, self.seed + source)

    def _sources(self, n_steps: int) -> np.ndarray:
        n_batches = np.asarray(self.source_sizes) // self.global_batch_size
        share = np.where(n_batches > 0, n_batches, 0) ** (1 / self.temperature)
        edges = np.cumsum(share / share.sum())
        # A stream's beginning does not depend on how much of it is drawn; powers of two make few lengths.
        uniform = _uniform(self.seed, 1 << (n_steps - 1).bit_length())[:n_steps]
        return np.minimum(np.searchsorted(edges, uniform, side="right"), len(edges) - 1)


class QueryBatches:
    """As `SourceBatches`, but of the examples of one query an epoch has one, drawn in each epoch again.

    Raises:
        UserError: no source has enough queries to fill a batch.
    """

    def __init__(
        self, query_of: Sequence[np.ndarray], global_batch_size: int, seed: int, temperature: float = 1.0
    ) -> None:
        """Args: query_of: of each source, the number of each example's query: 0, 1, …, all of them in use."""
        counts = [np.bincount(own) for own in query_of]
        self._queries = SourceBatches(tuple(map(len, counts)), global_batch_size, seed, temperature)
        self._counts = counts
        self._firsts = [np.cumsum(own) - own for own in counts]
        self._examples = [np.argsort(own, kind="stable") for own in query_of]
        self._offsets = np.cumsum([0, *map(len, query_of)])

    @property
    def steps_per_epoch(self) -> int:
        return self._queries.steps_per_epoch

    def __call__(self, step: int) -> np.ndarray:
        """Examples of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""
        source, turn = self._queries.source_of(step)
        batches = self._queries.of_source(source)
        query = batches(turn)
        share = _share(batches.n_rows, batches.seed, batches.epoch_of(turn))[query]
        place = self._firsts[source][query] + (share * self._counts[source][query]).astype(np.int64)
        found: np.ndarray = self._examples[source][place] + self._offsets[source]
        return found


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


@lru_cache(maxsize=8)
def _share(n_queries: int, seed: int, epoch: int) -> np.ndarray:
    """In [0, 1): which of a query's examples an epoch has."""
    key = np.random.SeedSequence([seed, epoch], spawn_key=(2,))
    return np.random.Generator(np.random.Philox(key)).random(n_queries)
