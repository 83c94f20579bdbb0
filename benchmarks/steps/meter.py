"""Measures a step: wall clock, processor time and, on CUDA, the GPU's own time and waits for it."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls that wait for the device, as the profiler names them. `.item()`, `.tolist()`, `nonzero` and copies
from unpinned memory make one each. `cudaDeviceSynchronize` is left out: the meter calls it itself."""
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class StepMeter:
    """Call `boundary` before the first step and after each: `n_steps` steps, the last ones profiled on CUDA.

    Args:
        warm_up: steps at the start that do not count.
        timed: steps whose median is reported.
        profiled: steps after them, under torch's profiler, on CUDA only: it slows them down.
        between: called after each boundary except those of profiled steps. Its time does not count. Two tools
            that take turns see the same machine, whose speed may change.
    """

    def __init__(
        self,
        device: torch.device,
        warm_up: int = 3,
        timed: int = 8,
        profiled: int = 1,
        between: Callable[[], Any] | None = None,
    ) -> None:
        self.on_cuda = device.type == "cuda"
        self.warm_up, self.timed = warm_up, timed
        self.profiled = profiled if self.on_cuda else 0
        self.between = between
        self._begun: tuple[float, float] | None = None
        self._spans: list[tuple[float, float]] = []
        self._profiler: Any = None
        self._profile: dict[str, float] = {}
        self._peak_mib = 0.0

    @property
    def n_steps(self) -> int:
        return self.warm_up + self.timed + self.profiled

    def boundary(self, *unused: Any) -> dict[str, float]:
        """Replaces the trainer's evaluation: ignores its arguments and returns no metrics."""
        done = 0 if self._begun is None else len(self._spans) + 1
        last_timed = self.warm_up + self.timed
        if self.on_cuda and (done <= last_timed or done == self.n_steps):
            torch.cuda.synchronize()
        self._end_span()
        if self.on_cuda and done == self.warm_up:
            torch.cuda.reset_peak_memory_stats()
        if self.profiled and done == last_timed:
            self._peak_mib = torch.cuda.max_memory_allocated() / 2**20
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        if self.profiled and done == self.n_steps:
            self._profiler.stop()
            self._profile = self._read_profile()
        if self.between is not None and done < last_timed:
            self.between()
        self._begun = _now()
        return {}

    def alone(self, step: Callable[[], Any]) -> None:
        """Measures one step of another tool, between the steps of one that takes turns with it."""
        if self.on_cuda:
            torch.cuda.synchronize()
        self._begun = _now()
        step()
        if self.on_cuda:
            torch.cuda.synchronize()
        self._end_span()

    def _end_span(self) -> None:
        if self._begun is not None:
            wall, processor = _now()
            self._spans.append((wall - self._begun[0], processor - self._begun[1]))

    def measure(self, step: Callable[[], Any]) -> dict[str, float]:
        """Runs `step` as often as the meter needs."""
        self.boundary()
        for _ in range(self.n_steps):
            step()
            self.boundary()
        return self.figures()

    def figures(self) -> dict[str, float]:
        """Returns median milliseconds of a step. On CUDA also counts for a profiled step, and MiB."""
        spans = self._spans[self.warm_up : self.warm_up + self.timed]
        wall, processor = zip(*spans, strict=True)
        figures = {
            "wall_ms": round(1e3 * median(wall), 2),
            "wall_ms_least": round(1e3 * min(wall), 2),
            "wall_ms_most": round(1e3 * max(wall), 2),
            "processor_ms": round(1e3 * median(processor), 2),
        }
        if self._profile:
            figures |= {**self._profile, "peak_mib": round(self._peak_mib, 1)}
        return figures

    def _read_profile(self) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return profile_figures(events, self.profiled)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def profile_figures(events: Iterable[dict[str, Any]], n_steps: int) -> dict[str, float]:
    """Returns figures of a step from the events of a trace in Chrome's format (times in microseconds)."""
    busy: list[tuple[float, float]] = []
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in GPU_WORK:
            busy.append((event["ts"], event["ts"] + event["dur"]))
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            calls[event["name"]] += 1

    def a_step(names: tuple[str, ...]) -> float:
        return round(sum(calls[name] for name in names) / n_steps, 1)

    return {
        "gpu_ms": round(covered(busy) / 1e3 / n_steps, 2),
        "waits": a_step(WAITS),
        "launches": a_step(LAUNCHES),
        "copies": a_step(COPIES),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of spans, because streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
