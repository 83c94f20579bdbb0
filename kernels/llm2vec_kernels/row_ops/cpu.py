"""RMSNorm, gated units and rotary embedding on a CPU: a few rows at a time go through all steps, in cache.

Shape legend: T tokens (or any leading dimensions), D width, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

ELEMENTS_PER_THREAD = 2**17
"""Of a chunk: half a MiB in fp32. Smaller ones fit a nearer cache, but then each operation's start counts."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few rows of all tensors at a time."""
    width = max(tensor[0].numel() for tensor in tensors) if len(tensors[0]) else 1
    n_rows = max(1, ELEMENTS_PER_THREAD * torch.get_num_threads() // width)
    if n_rows >= len(tensors[0]):
        return iter((tensors,))
    return zip(*(tensor.split(n_rows) for tensor in tensors), strict=True)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def rms_norm_dtype(x: torch.Tensor, weight: torch.Tensor, plus_one: bool) -> torch.dtype:
    return x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.rms_norm`."""
    rows_TD = _rows(x_TD)
    out_TD = torch.empty_like(rows_TD, dtype=rms_norm_dtype(x_TD, weight_D, plus_one))
    factor_D = weight_D.to(wide_dtype(x_TD.dtype)) + 1 if plus_one else weight_D
    inverse_T1 = rows_TD.new_empty(len(rows_TD), 1, dtype=wide_dtype(x_TD.dtype))
    for x, inverse, out in _chunks(rows_TD, inverse_T1, out_TD):
        wide = x.to(inverse.dtype)
        torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=inverse)
        inverse.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        if plus_one:
            torch.mul(wide * inverse, factor_D, out=out)
            continue
        torch.mul(wide, inverse, out=out)
        if out.dtype != x.dtype:
            out.copy_(out.to(x.dtype))
        out.mul_(factor_D)
    return out_TD.view(x_TD.shape), inverse_T1.view(x_TD.shape[:-1])


def rms_norm_backward(
    d_out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    inverse_T: torch.Tensor,
    weight_is_frozen: bool,
    plus_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.rms_norm_backward`."""
    rows_TD = _rows(x_TD)
    d_x_TD = torch.empty_like(rows_TD)
    d_weight_D = torch.zeros(weight_D.shape, dtype=inverse_T.dtype)
    factor_D = weight_D.to(inverse_T.dtype) + int(plus_one)
    for d_out, x, inverse, d_x in _chunks(_rows(d_out_TD), rows_TD, inverse_T.reshape(-1, 1), d_x_TD):
        normal = x * inverse
        if not weight_is_frozen:
            d_weight_D.add_((d_out * normal).sum(0))
        g = d_out.to(inverse.dtype) * factor_D
        mean = (g * normal).mean(1, keepdim=True)
        torch.mul(g.sub_(normal.mul_(mean)), inverse, out=d_x)
    return d_x_TD.view(x_TD.shape), d_weight_D.to(weight_D.dtype)


_ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "silu": (
        lambda x, out: torch.ops.aten.silu.out(x, out=out),
        lambda d, x, out: torch.ops.aten.silu_backward.grad_input(d, x, grad_input=out),
    ),
    "gelu_tanh": (
        lambda x, out: torch.ops.aten.gelu.out(x, approximate="tanh", out=out),
        lambda d, x, out: torch.ops.aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out),
    ),
}
"""The function, and its derivative times d; each writes to `out`."""


def gated_unit(gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """As `api.gated_unit`."""
    activate, _ = _ACTIVATIONS[activation]
    gates_TD = _rows(gate_TD)
    out_TD = torch.empty_like(gates_TD)
    for gate, up, out in _chunks(gates_TD, _rows(up_TD), out_TD):
        activate(gate, out)
        out.mul_(up)
    return out_TD.view(gate_TD.shape)


def gated_unit_backward(
    d_out_TD: torch.Tensor, gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.gated_unit_backward`."""
    activate, differentiate = _ACTIVATIONS[activation]
    gates_TD = _rows(gate_TD)
    d_gate_TD, d_up_TD = torch.empty_like(gates_TD), torch.empty_like(gates_TD)
    for d_out, gate, up, d_gate, d_up in _chunks(_rows(d_out_TD), gates_TD, _rows(up_TD), d_gate_TD, d_up_TD):
        activate(gate, d_up)
        d_up.mul_(d_out)
        torch.mul(d_out, up, out=d_gate)
        differentiate(d_gate, gate, d_gate)
    return d_gate_TD.view(gate_TD.shape), d_up_TD.view(gate_TD.shape)


def rotate(
    x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, backward: bool = False
) -> torch.Tensor:
    """As `api.rotate`."""
    half = x_THE.shape[-1] // 2
    out_THE = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
    for x, cos, sin, out in _chunks(x_THE, cos_TE[:, None], sin_TE[:, None], out_THE):
        torch.mul(x, cos, out=out)
        sin_of_a, sin_of_b = (sin[..., half:], sin[..., :half])
        if backward:
            out[..., :half].addcmul_(x[..., half:], sin_of_a)
            out[..., half:].addcmul_(x[..., :half], sin_of_b, value=-1)
        else:
            out[..., :half].addcmul_(x[..., half:], sin_of_b, value=-1)
            out[..., half:].addcmul_(x[..., :half], sin_of_a)
    return out_THE
