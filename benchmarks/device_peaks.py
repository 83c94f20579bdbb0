"""Measures the best speed of this device: matrix products and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the best speed of several square products, each over ten in a row."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024,):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

        def ten(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            for _ in range(10):
                a @ b

        seconds = min(seconds_of(ten, device) for _ in range(4))
        best = max(best, 10 * 2 * size**3 / seconds / 1e12)
    return best


def copy_gb_per_s(device: torch.device, mib: int = 2048) -> float:
    """Returns the best of five copies within the device's memory. Bytes read and written both count."""
    source = torch.randn(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / seconds / 1e9
