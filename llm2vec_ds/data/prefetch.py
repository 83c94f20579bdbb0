"""The next step's batch is made while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Calls `make(step)` one step ahead, in a thread; what it raises, the call for that step raises.

    Args:
        make: a pure function, so that a step is the same whoever makes it, and when.
        n_steps: none is made from this one on.
    """

    def __init__(self, make: Callable[[int], T], n_steps: int) -> None:
        self._make = make
        self._n_steps = n_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._making = Lock()
        self._begun: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        made = self._begun.pop(step, None) or self._thread.submit(self._make_alone, step)
        self._begun.clear()
        batch = made.result()
        if step + 1 < self._n_steps:
            self._begun[step + 1] = self._thread.submit(self._make_alone, step + 1)
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is made in this context, which waits for what is being made."""
        with self._making:
            yield

    def _make_alone(self, step: int) -> T:
        with self._making:
            return self._make(step)

    def close(self) -> None:
        """Waits for what is being made, which holds the data open."""
        self._thread.shutdown(cancel_futures=True)
