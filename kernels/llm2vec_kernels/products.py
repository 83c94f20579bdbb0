"""fp32 matrix products on a CPU, by MKL or by oneDNN, whichever is faster on this processor.

PyTorch uses MKL for fp32. MKL uses vectors of 256 bits on processors that are not Intel's. PyTorch also
contains oneDNN, which uses 512 bits wherever the processor has them. On a Zen 5 oneDNN is more than twice as
fast in every shape of a layer. On older processors with units of 256 bits it is a little slower.

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
"""oneDNN is chosen from this ratio of speeds on. Real ratios are near 1 or near 2, where vectors are twice as
wide. The limit is midway, so chance hardly decides, and a resumed run computes the same bits."""
LEAST_FOR_ONEDNN = 2**20
"""oneDNN computes products of at least this many multiplications (T · I · O). One call takes 10 µs or more.
On a Zen 4 it is half as fast as MKL at 2^18, as fast at 2^20 and twice as fast at 2^24. It refuses empty
products."""
_SIZE, _ROUNDS = 512, 5
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "1"}
"""Limits of two caches. oneDNN compiles a product for its shapes, up to a megabyte of code, and keeps 1,024.
PyTorch's layer over it keeps as many, each with a buffer of an operand's size (0 crashes it, and more than 1
is no faster). Packed batches differ in their number of tokens, so the defaults would keep hundreds of
megabytes for nothing."""


class CpuProducts(NamedTuple):
    """The library that computes, and why: `oneDNN`, or `MKL` (or what PyTorch was built with instead)."""

    name: str
    reason: str
    environment: str = ""
    """oneDNN's environment variables, for the log."""


@cache
def cpu_products() -> CpuProducts:
    """Returns the choice for this process. It is measured once, unless `LLM2VEC_ONEDNN` is 0 or 1."""
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
    """Sets the variables that are not set yet, and returns all. oneDNN reads them at its first product."""
    for name, capacity in _CACHES.items():
        os.environ.setdefault(name, capacity)
    return ", ".join(f"{name}={os.environ[name]}" for name in _CACHES)


def usual_library() -> str:
    """The library that PyTorch uses for fp32 products."""
    return "MKL" if torch.backends.mkl.is_available() else "PyTorch's own choice"


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x · Wᵀ + bias, `[T, O]`, without a graph: for use in operations, or under `torch.no_grad`.

    Other dtypes and devices use PyTorch's own product. Any strides are allowed: `weight.T` costs no copy.

    Raises:
        RuntimeError: an input requires a gradient, which would be lost.
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
    """Returns scale · x · M, `[T, O]`: like `product`, but the matrix is not transposed.

    Args:
        like_TO: any tensor of the result's shape and dtype, if there is one. Its values are not read.
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
        raise RuntimeError("this product has no gradient: call it in an operation, or under no_grad")


def is_for_onednn(x_TI: torch.Tensor, width: int) -> bool:
    """Whether oneDNN computes the product `[T, width]` of this tensor. One call of it takes some 10 µs."""
    return (
        x_TI.is_cpu
        and x_TI.dtype == torch.float32
        and x_TI.numel() * width >= LEAST_FOR_ONEDNN
        and cpu_products().name == "oneDNN"
    )


def _onednn(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    bias_O = None if bias_O is None else bias_O.contiguous()  # oneDNN does not read a bias's strides
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return out


def _speed_of_onednn() -> float:
    """Returns oneDNN's speed over the usual library's.

    It takes processor time of one thread, so other work on this machine counts little.
    """
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
