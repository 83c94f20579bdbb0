"""Batches are a pure function of (size, seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_ds.data.batches import global_batch, rank_slice
from llm2vec_ds.errors import UserError


@given(n_rows=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_an_epoch_visits_each_row_at_most_once(n_rows: int, size: int, seed: int) -> None:
    if n_rows < size:
        with pytest.raises(UserError, match="do not fill"):
            global_batch(n_rows, size, seed, 0)
        return
    steps = n_rows // size
    epoch = np.concatenate([global_batch(n_rows, size, seed, step) for step in range(steps)])
    assert len(epoch) == len(set(epoch.tolist())) == steps * size
    assert set(epoch.tolist()) <= set(range(n_rows))


def test_steps_seeds_and_epochs_differ_and_repeat() -> None:
    first = global_batch(100, 10, 0, 3)
    assert (first == global_batch(100, 10, 0, 3)).all()
    assert (first != global_batch(100, 10, 1, 3)).any()
    assert (first != global_batch(100, 10, 0, 13)).any()


@given(size=st.integers(1, 50), world=st.integers(1, 9))
def test_ranks_share_a_batch_without_overlap(size: int, world: int) -> None:
    batch = np.arange(size)
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    assert (np.concatenate(parts) == batch).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
