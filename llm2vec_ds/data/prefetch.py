"""Makes the next step's batch while this step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Calls `make(step)` one step ahead, in a thread. If it raises, the call for that step raises.

    Args:
        make: a pure function. So a batch does not depend on when or in which thread it is made.
        n_steps: number of steps. No batch is made from this step on.
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
        """Waits for the batch in progress, and makes no batch inside this context."""
        with self._making:
            yield

    def _make_alone(self, step: int) -> T:
        with self._making:
            return self._make(step)

    def close(self) -> None:
        """Waits for the batch in progress, because it keeps the data files open."""
        self._thread.shutdown(cancel_futures=True)
