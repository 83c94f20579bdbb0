"""RMSNorm, SwiGLU, GeGLU and rotary embedding as formulas, with inputs for our operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from llm2vec_kernels.row_ops import api as row_ops

EPS = 1e-5


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rms_norm_plus_one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight + 1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    bend = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    return 0.5 * gate * (1 + bend) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As a product with a matrix for each token."""
    half = x.shape[-1] // 2
    zero, one = x.new_zeros(half, half), torch.eye(half, dtype=x.dtype, device=x.device)
    turned = torch.cat([torch.cat([zero, -one], 1), torch.cat([one, zero], 1)], 0)
    matrix = torch.diag_embed(cos) + torch.diag_embed(sin) @ turned
    return torch.einsum("tij,thj->thi", matrix, x)


Function = Callable[..., torch.Tensor]


CASES: dict[str, tuple[Function, Function, Callable[[int, int], list[torch.Tensor]], int]] = {
    "rms_norm": (
        lambda x, weight: row_ops.rms_norm(x, weight, EPS)[0],
        rms_norm,
        lambda n, width: [torch.randn(n, width), torch.randn(width)],
        2,
    ),
    "rms_norm_plus_one": (
        lambda x, weight: row_ops.rms_norm(x, weight, EPS, True)[0],
        rms_norm_plus_one,
        lambda n, width: [torch.randn(n, width), torch.randn(width)],
        2,
    ),
    "swiglu": (
        lambda gate, up: row_ops.gated_unit(gate, up, "silu"),
        swiglu,
        lambda n, width: [torch.randn(n, width), torch.randn(n, width)],
        2,
    ),
    "geglu": (
        lambda gate, up: row_ops.gated_unit(gate, up, "gelu_tanh"),
        geglu,
        lambda n, width: [3 * torch.randn(n, width), torch.randn(n, width)],
        2,
    ),
    "rotate": (
        row_ops.rotate,
        rotate,
        lambda n, width: [torch.randn(n, 3, 2 * width), *torch.randn(2, n, 2 * width)],
        1,
    ),
}
"""Ours, the formula, its inputs, and how many of them have gradients."""


def outcome(function: Function, inputs: list[torch.Tensor], n_differentiable: int) -> list[torch.Tensor]:
    """Output and gradients for a fixed random one of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:n_differentiable]]
    out = function(*leaves, *inputs[n_differentiable:])
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out))]
