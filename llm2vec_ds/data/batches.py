"""Which text goes to which step and rank: a pure function, so nothing about data order is ever stored."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from llm2vec_ds.errors import UserError


def global_batch(n_rows: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of step `step` (from 0), `[global_batch_size]` int64, the same on every rank.

    Each epoch is a new permutation cut into whole batches; the `n_rows % global_batch_size` rows at its
    end sit out, others each time. A batch never holds a row twice.

    Raises:
        UserError: there are fewer rows than a batch takes.
    """
    if n_rows < global_batch_size:
        raise UserError(
            f"{n_rows} texts do not fill one batch of {global_batch_size}: "
            "lower batch.global_batch_size or give more data"
        )
    epoch, position = divmod(step, n_rows // global_batch_size)
    return _permutation(n_rows, seed, epoch)[position * global_batch_size :][:global_batch_size]


def rank_slice(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous part of a global batch; parts are disjoint and differ by one row at most."""
    return np.array_split(rows, world_size)[rank]


@lru_cache(maxsize=2)
def _permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n_rows)
