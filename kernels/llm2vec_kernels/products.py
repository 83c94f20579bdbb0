"""fp32 matrix products on a CPU, by MKL or by oneDNN, whichever this processor computes faster.

PyTorch takes MKL for fp32, which uses vectors of 256 bits on processors that are not Intel's. oneDNN, which
PyTorch brings along too, uses 512 wherever there are any: on a Zen 5 it is more than twice as fast in every
shape; where the units are 256 bits wide, as in older ones, it is a little slower.

Shape legend: T rows, I and O width of input and output.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

MUCH_FASTER = 1.5
"""Midway between two that are as fast and twice the width of vectors, so that chance hardly decides: a run
that goes on in another process has the same bits."""
LEAST_FOR_ONEDNN = 2**20
"""oneDNN computes products of at least this many multiplications (T · I · O). One call takes 10 µs or more.
On a Zen 4 it is half as fast as MKL at 2^18, as fast at 2^20, twice as fast at 2^24. It has no empty ones."""
_SIZE, _ROUNDS = 512, 5
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "1"}
"""oneDNN compiles a product for its shapes, up to a megabyte of code, and keeps 1,024 of them; PyTorch's
layer over it as many, each with a buffer of an operand's size (0 crashes it, and more than 1 is no faster).
Packed batches differ in their number of tokens, so hundreds of megabytes would be kept for nothing."""


class CpuProducts(NamedTuple):
    """Who computes, `MKL` (or what else PyTorch was built with) or `oneDNN`, and why."""

    name: str
    reason: str
    environment: str = ""
    """Variables that hold for oneDNN, for the log."""


@cache
def cpu_products() -> CpuProducts:
    """The choice for this process: measured once, unless `LLM2VEC_ONEDNN` in the environment is 0 or 1."""
    usual = usual_library()
    if not torch.backends.mkldnn.is_available():
        return CpuProducts(usual, "this PyTorch has no oneDNN")
    asked = os.environ.get("LLM2VEC_ONEDNN")
    if asked == "0":
        return CpuProducts(usual, "LLM2VEC_ONEDNN=0")
    caches = _limit_caches()
    if asked == "1":
        return CpuProducts("oneDNN", "LLM2VEC_ONEDNN=1", caches)
    ratio = _speed_of_onednn()
    unknown = f"LLM2VEC_ONEDNN={asked} is neither 0 nor 1; " if asked else ""
    reason = f"{unknown}oneDNN is {ratio:.1f} times as fast as {usual} here"
    if ratio >= MUCH_FASTER:
        return CpuProducts("oneDNN", reason, caches)
    return CpuProducts(usual, reason)


def _limit_caches() -> str:
    """Sets what the environment does not say yet; oneDNN reads it at its first product. What it says then."""
    for name, capacity in _CACHES.items():
        os.environ.setdefault(name, capacity)
    return ", ".join(f"{name}={os.environ[name]}" for name in _CACHES)


def usual_library() -> str:
    """What PyTorch gives fp32 products to."""
    return "MKL" if torch.backends.mkl.is_available() else "PyTorch's own choice"


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x · Wᵀ + bias, `[T, O]`, without a graph: for the inside of operations, and for `torch.no_grad`.

    What is no fp32 on a CPU takes PyTorch's own way. Any strides will do, `weight.T` costs no copy.

    Raises:
        RuntimeError: a gradient is asked for, which would be lost.
    """
    if bias_O is None:
        return times(x_TI, weight_OI.t())
    _refuse_gradient(x_TI, weight_OI)
    if is_for_onednn(x_TI, weight_OI.shape[0]):
        return _onednn(x_TI, weight_OI, bias_O)
    return torch.addmm(bias_O, x_TI, weight_OI.t())


def times(
    x_TI: torch.Tensor,
    matrix_IO: torch.Tensor,
    scale: float = 1.0,
    *,
    like_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale · x · M, `[T, O]`, as `product`: the same with the matrix as it stands.

    Args:
        like_TO: any tensor of the result's shape and dtype, where there is one. Nothing of it is read.
    """
    _refuse_gradient(x_TI, matrix_IO)
    if is_for_onednn(x_TI, matrix_IO.shape[1]):
        out_TO = _onednn(x_TI, matrix_IO.t(), None)
        return out_TO if scale == 1.0 else out_TO.mul_(scale)
    if scale == 1.0:
        return torch.mm(x_TI, matrix_IO)
    ignored = x_TI.new_empty(()) if like_TO is None else like_TO
    return torch.addmm(ignored, x_TI, matrix_IO, beta=0, alpha=scale)


def _refuse_gradient(x: torch.Tensor, weight: torch.Tensor) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError("a product has no gradient: call it in an operation, or under no_grad")


def is_for_onednn(x_TI: torch.Tensor, width: int) -> bool:
    """Does oneDNN compute the product `[T, width]` of this tensor? It takes some 10 µs to call."""
    return (
        x_TI.is_cpu
        and x_TI.dtype == torch.float32
        and x_TI.numel() * width >= LEAST_FOR_ONEDNN
        and cpu_products().name == "oneDNN"
    )


def _onednn(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    bias_O = None if bias_O is None else bias_O.contiguous()  # of a bias the strides are not read
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return out


def _speed_of_onednn() -> float:
    """Times the usual library's. Processor time of one thread, so that what else runs here counts little."""
    a, b = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    ways: tuple[Callable[[], torch.Tensor], ...] = (lambda: a @ b.T, lambda: _onednn(a, b, None))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            rounds = [[_thread_time_s(way) for way in ways] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(n_threads)
    usual_s, onednn_s = map(min, zip(*rounds, strict=True))
    return usual_s / onednn_s


def _thread_time_s(work: Callable[[], torch.Tensor]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started
