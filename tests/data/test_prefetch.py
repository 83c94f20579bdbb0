"""Batches made one step ahead: in order, once, in a thread, with their errors."""

from __future__ import annotations

import threading

import pytest

from llm2vec_ds.data.prefetch import Prefetch
from llm2vec_ds.errors import UserError


def test_each_step_is_made_once_and_one_ahead() -> None:
    made: list[int] = []
    next_is_there = threading.Event()

    def make(step: int) -> str:
        made.append(step)
        if step == 3:
            next_is_there.set()
        return f"batch {step} by {threading.current_thread().name}"

    prefetch = Prefetch(make, n_steps=5)
    assert prefetch(2).startswith("batch 2 by prefetch")
    assert next_is_there.wait(60)  # before it is asked for
    assert [prefetch(step)[:7] for step in (3, 4)] == ["batch 3", "batch 4"]
    prefetch.close()
    assert made == [2, 3, 4]


def test_another_step_than_the_next_is_served() -> None:
    prefetch = Prefetch(lambda step: step * 10, n_steps=9)
    assert [prefetch(step) for step in (0, 7, 2)] == [0, 70, 20]
    prefetch.close()


def test_an_error_comes_with_its_own_step() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise UserError("row 7 cannot be read")
        return step

    prefetch = Prefetch(make, n_steps=3)
    assert prefetch(0) == 0
    with pytest.raises(UserError, match="row 7"):
        prefetch(1)
    prefetch.close()
