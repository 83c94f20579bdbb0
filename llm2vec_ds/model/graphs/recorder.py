"""Records what a function does on a GPU, to do it again by one call (CUDA graphs)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], Any]

WARM_UP_PASSES = 2
"""Before a recording: kernels are compiled, and libraries make their handles and workspaces."""


class Recorder(Protocol):
    """Functions given to it read and write tensors that stay where they are."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Runs what will be recorded, for its effects on caches and libraries."""

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        """What `run` returns, holding no values yet, and what computes them: each call computes them again
        in the same tensors."""

    def forget(self) -> None:
        """All recordings are gone."""


class CudaRecorder:
    """One memory pool for all recordings: no two are in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> None:
        with self._aside():
            for _ in range(WARM_UP_PASSES):
                run()

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream, collects = torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # a tensor that dies in a recording belongs to another pool
        try:
            # Backward in this thread: only what this thread does is held to the rules of a recording.
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                outcome = run()
        except BaseException:
            # torch leaves its own stream current, and before 2.12 its allocator in the recording
            # (pytorch#180395). What is over already says so by an error.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise
        finally:
            if collects:
                gc.enable()
        return outcome, graph.replay

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of the recordings, after what was begun before and before what comes next."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)
