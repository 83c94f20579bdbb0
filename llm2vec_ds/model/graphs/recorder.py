"""Records what a function does on a GPU. One call then repeats all of it (CUDA graphs)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], Any]

WARM_UP_PASSES = 2
"""Passes before a recording. They compile kernels, and libraries make their handles and workspaces."""


class Recorder(Protocol):
    """Records functions. They must read and write tensors that stay at the same addresses."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Runs a function before it is recorded, so that caches and libraries are ready."""

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        """Returns what `run` returns, and a replay. The tensors hold no values until the replay is called.

        Each call of the replay computes the values again, in the same tensors.
        """

    def forget(self) -> None:
        """Frees the memory of recordings that are gone. None of them may be replayed afterwards."""


class CudaRecorder:
    """Records with CUDA graphs. All recordings share one memory pool, because no two run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def warm_up(self, run: Callable[[], Any]) -> None:
        with self._aside():
            for _ in range(WARM_UP_PASSES):
                run()

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream, collects = torch.cuda.current_stream(), gc.isenabled()
        # Garbage collection in a recording could free tensors that belong to another pool.
        gc.disable()
        try:
            # CUDA applies the rules of a recording to this thread only ("thread_local"). So backward must run
            # in this thread too.
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                outcome = run()
        except BaseException:
            # After a failed recording torch leaves its side stream current. Before 2.12 its allocator also
            # stays in the recording (pytorch#180395). If it does not, the call raises, which is harmless.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            # Before 2.12 its generator stays in the recording too (pytorch#176752). A copy of the generator's
            # state does not.
            generator = torch.cuda.default_generators[self._device.index]
            with suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            if collects:
                gc.enable()
        return outcome, graph.replay

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Runs the block on the stream of the recordings, ordered after earlier and before later work."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
