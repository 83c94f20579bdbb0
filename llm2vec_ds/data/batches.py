"""Decides which text goes to which step and rank. It is a pure function, so no data order is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from llm2vec_ds.errors import UserError


class GlobalBatches(Protocol):
    """Returns the rows of each step over all ranks: a pure function of data, seed and step."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches of all sources."""

    def __call__(self, step: int) -> np.ndarray:
        """Returns the rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""


@dataclass(frozen=True)
class EpochBatches:
    """Batches of one source. Each epoch is a new permutation of its rows, cut into whole batches.

    An epoch leaves out its last `n_rows % global_batch_size` rows. These differ between epochs. A batch never
    holds a row twice.

    Raises:
        UserError: there are fewer rows than one batch needs.
    """

    n_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_rows < self.global_batch_size:
            raise UserError(
                f"{self.n_rows} texts do not fill one batch of {self.global_batch_size}: "
                "lower batch.global_batch_size, or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_rows // self.global_batch_size

    def __call__(self, step: int) -> np.ndarray:
        """Returns the rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""
        position = step % self.steps_per_epoch
        order = _permutation(self.n_rows, self.seed, self.epoch_of(step))
        return order[position * self.global_batch_size :][: self.global_batch_size]

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch


@dataclass(frozen=True)
class SourceBatches:
    """Batches of several sources. Each batch comes from one source, so in-batch negatives are of one kind.

    The source of a step is drawn with probability ∝ (number of its batches)^(1/temperature). Each source has
    its own epochs, as in `EpochBatches`. Row numbers run through all sources, in order. A source that does
    not fill a batch is never drawn.

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
                "lower batch.global_batch_size, or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches of all sources.

        Sources are drawn at random, so these steps give one epoch of each only on average, and only at
        `temperature` 1.
        """
        return sum(size // self.global_batch_size for size in self.source_sizes)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank."""
        source, turn = self.source_of(step)
        return self.of_source(source)(turn) + sum(self.source_sizes[:source])

    def source_of(self, step: int) -> tuple[int, int]:
        """Returns the source of a step, and how many earlier steps used that source."""
        drawn = self._sources(step + 1)
        source = int(drawn[step])
        return source, int((drawn[:step] == source).sum())

    def of_source(self, source: int) -> EpochBatches:
        """Returns the batches of one source. Its rows are counted from 0."""
        return EpochBatches(self.source_sizes[source], self.global_batch_size, self.seed + source)

    def _sources(self, n_steps: int) -> np.ndarray:
        n_batches = np.asarray(self.source_sizes) // self.global_batch_size
        share = np.where(n_batches > 0, n_batches, 0) ** (1 / self.temperature)
        edges = np.cumsum(share / share.sum())
        # The first numbers of a stream do not depend on how many are drawn. So the length is rounded up to a
        # power of two, and `_uniform` is called with few different lengths, which its cache holds.
        uniform = _uniform(self.seed, 1 << (n_steps - 1).bit_length())[:n_steps]
        return np.minimum(np.searchsorted(edges, uniform, side="right"), len(edges) - 1)


class QueryBatches:
    """As `SourceBatches`, but an epoch has only one example of each query. Each epoch draws it anew.

    Raises:
        UserError: no source has enough queries to fill a batch.
    """

    def __init__(
        self, query_of: Sequence[np.ndarray], global_batch_size: int, seed: int, temperature: float = 1.0
    ) -> None:
        """Args: query_of: for each source, the query number of each example: 0, 1, … without gaps."""
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
        """Returns the examples of step `step` (from 0), `[global_batch_size]` int64, equal on every rank."""
        source, turn = self._queries.source_of(step)
        batches = self._queries.of_source(source)
        query = batches(turn)
        # A share in [0, 1) of the query's examples picks one of them: floor(share · count).
        share = _share(batches.n_rows, batches.seed, batches.epoch_of(turn))[query]
        place = self._firsts[source][query] + (share * self._counts[source][query]).astype(np.int64)
        found: np.ndarray = self._examples[source][place] + self._offsets[source]
        return found


def rank_slice(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Returns this rank's contiguous part of a global batch. Sizes of parts differ by at most one row."""
    return np.array_split(rows, world_size)[rank]


@lru_cache(maxsize=8)
def _permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n_rows)


@lru_cache(maxsize=2)
def _uniform(seed: int, n: int) -> np.ndarray:
    key = np.random.SeedSequence(seed, spawn_key=(1,))  # differs from the keys of `_permutation`
    return np.random.Generator(np.random.Philox(key)).random(n)


@lru_cache(maxsize=8)
def _share(n_queries: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a number in [0, 1) for each query. It picks the query's example in this epoch."""
    key = np.random.SeedSequence([seed, epoch], spawn_key=(2,))
    return np.random.Generator(np.random.Philox(key)).random(n_queries)
