"""RMSNorm, SwiGLU, GeGLU and rotary embedding: our operations, the reference, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from llm2vec_kernels.row_ops import api as row_ops
from llm2vec_kernels.row_ops import reference

EPS = 1e-5

Function = Callable[..., torch.Tensor]


CASES: dict[str, tuple[Function, Function, Callable[[int, int], list[torch.Tensor]], int]] = {
    "rms_norm": (
        lambda x, weight: row_ops.rms_norm(x, weight, EPS)[0],
        lambda x, weight: reference.rms_norm(x, weight, EPS),
        lambda n, width: [torch.randn(n, width), torch.randn(width)],
        2,
    ),
    "rms_norm_plus_one": (
        lambda x, weight: row_ops.rms_norm(x, weight, EPS, True)[0],
        lambda x, weight: reference.rms_norm(x, weight, EPS, True),
        lambda n, width: [torch.randn(n, width), torch.randn(width)],
        2,
    ),
    "swiglu": (
        lambda gate, up: row_ops.gated_unit(gate, up, "silu"),
        lambda gate, up: reference.gated_unit(gate, up, "silu"),
        lambda n, width: [torch.randn(n, width), torch.randn(n, width)],
        2,
    ),
    "geglu": (
        lambda gate, up: row_ops.gated_unit(gate, up, "gelu_tanh"),
        lambda gate, up: reference.gated_unit(gate, up, "gelu_tanh"),
        lambda n, width: [3 * torch.randn(n, width), torch.randn(n, width)],
        2,
    ),
    "rotate": (
        lambda q, k, cos, sin: torch.cat(row_ops.rotate(q, k, cos, sin), 1),
        lambda q, k, cos, sin: torch.cat([reference.rotate(x, cos, sin) for x in (q, k)], 1),
        lambda n, width: [
            torch.randn(n, 3, 2 * width),
            torch.randn(n, 2, 2 * width),
            *torch.randn(2, n, 2 * width),
        ],
        2,
    ),
}
"""Ours, the reference, its inputs, and how many of them have gradients."""


def outcome(function: Function, inputs: list[torch.Tensor], n_differentiable: int) -> list[torch.Tensor]:
    """Output and gradients for a fixed random one of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:n_differentiable]]
    out = function(*leaves, *inputs[n_differentiable:])
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out))]
