"""Batches are a pure function of (size, seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_ds.data.batches import EpochBatches, QueryBatches, SourceBatches, rank_slice
from llm2vec_ds.errors import UserError


@given(n_rows=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_an_epoch_visits_each_row_at_most_once(n_rows: int, size: int, seed: int) -> None:
    if n_rows < size:
        with pytest.raises(UserError, match="do not fill"):
            EpochBatches(n_rows, size, seed)
        return
    steps = n_rows // size
    batches = EpochBatches(n_rows, size, seed)
    epoch = np.concatenate([batches(step) for step in range(steps)])
    assert len(epoch) == len(set(epoch.tolist())) == steps * size
    assert set(epoch.tolist()) <= set(range(n_rows))


def test_steps_seeds_and_epochs_differ_and_repeat() -> None:
    first = EpochBatches(100, 10, 0)(3)
    assert (first == EpochBatches(100, 10, 0)(3)).all()
    assert (first != EpochBatches(100, 10, 1)(3)).any()
    assert (first != EpochBatches(100, 10, 0)(13)).any()


@given(size=st.integers(1, 50), world=st.integers(1, 9))
def test_ranks_share_a_batch_without_overlap(size: int, world: int) -> None:
    batch = np.arange(size)
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    assert (np.concatenate(parts) == batch).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def source_of(rows: np.ndarray, sizes: tuple[int, ...]) -> int:
    sources = np.searchsorted(np.cumsum(sizes), rows, side="right")
    assert len(set(sources.tolist())) == 1
    return int(sources[0])


def test_a_batch_is_of_one_source_and_a_source_goes_through_epochs() -> None:
    sizes = (23, 3, 50)  # the second never fills a batch of 5
    batches = SourceBatches(sizes, 5, seed=7)
    seen: dict[int, list[np.ndarray]] = {0: [], 2: []}
    for step in range(200):
        rows = batches(step)
        seen[source_of(rows, sizes)].append(rows)
        assert (rows == SourceBatches(sizes, 5, seed=7)(step)).all()
    for source, n_batches in ((0, 4), (2, 10)):
        for start in range(0, len(seen[source]) - n_batches, n_batches):
            epoch = np.concatenate(seen[source][start : start + n_batches])
            assert len(set(epoch.tolist())) == n_batches * 5
    # 4 of 14 batches are of the first source: 57 of 200, standard deviation 6.4.
    assert 57 - 20 < len(seen[0]) < 57 + 20
    assert (batches(3) != SourceBatches(sizes, 5, seed=8)(3)).any()


def test_a_high_temperature_draws_sources_evenly() -> None:
    sizes = (40, 4000)
    drawn = [source_of(SourceBatches(sizes, 4, 0, temperature=1e6)(step), sizes) for step in range(200)]
    assert 100 - 22 < sum(drawn) < 100 + 22
    drawn = [source_of(SourceBatches(sizes, 4, 0)(step), sizes) for step in range(200)]
    assert sum(drawn) > 190


def test_no_source_fills_a_batch() -> None:
    with pytest.raises(UserError, match="the largest has 9 examples"):
        SourceBatches((3, 9), 10, 0)


def test_an_epoch_has_as_many_steps_as_whole_batches() -> None:
    batches = EpochBatches(23, 5, 0)
    assert batches.steps_per_epoch == 4
    of_one_epoch = [set(batches(step)) for step in range(4)]
    assert len(set.union(*of_one_epoch)) == 20  # each row once at most
    assert SourceBatches((23, 4, 11), 5, 0).steps_per_epoch == 4 + 0 + 2


def test_an_epoch_has_one_example_of_each_query() -> None:
    query_of = [np.array([0, 1, 2, 3, 4, 2, 0, 0]), np.arange(3), np.array([1, 0, 0, 2, 3, 3])]
    batches = QueryBatches(query_of, 2, seed=3)
    query = np.concatenate([own + 10 * number for number, own in enumerate(query_of)])
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(600):
        rows = batches(step)
        assert (rows == QueryBatches(query_of, 2, seed=3)(step)).all()
        (source,) = set((query[rows] // 10).tolist())
        seen[source] += rows.tolist()
    for source, n_used in ((0, 4), (2, 4)):  # of 5 and 4 queries; the fifth sits out
        for start in range(0, len(seen[source]) - n_used, n_used):
            epoch = query[seen[source][start : start + n_used]]
            assert len(set(epoch.tolist())) == n_used
    of_first = np.bincount([row for row in seen[0] if query[row] == 0], minlength=8)[[0, 6, 7]]
    n = of_first.sum()
    assert (abs(of_first - n / 3) < 4 * np.sqrt(n * 2 / 9)).all()
    assert batches.steps_per_epoch == 2 + 1 + 2


def test_with_one_example_a_query_it_is_the_same() -> None:
    orders = [np.random.default_rng(0).permutation(n) for n in (9, 12)]
    drawn, plain = QueryBatches(orders, 4, seed=1), SourceBatches((9, 12), 4, seed=1)
    queries = np.concatenate([orders[0], orders[1] + 9])
    for step in range(30):
        assert (queries[drawn(step)] == plain(step)).all()
