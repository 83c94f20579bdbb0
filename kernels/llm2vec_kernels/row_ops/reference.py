"""The specification of RMSNorm, gated units and rotary embedding, in plain PyTorch.

It is slow, obvious, and exact in the dtype of its inputs.

Shape legend: T tokens, D width, H heads, E head dim.
"""

from __future__ import annotations

import torch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """Returns weight · x / √(mean x² + eps), `[T, D]` (arXiv 1910.07467). `plus_one` takes weight + 1."""
    factor_D = weight_D + 1 if plus_one else weight_D
    return factor_D * x_TD / (x_TD.square().mean(-1, keepdim=True) + eps).sqrt()


def gated_unit(gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """Returns activation(gate) · up, `[T, D]` (arXiv 2002.05202): `silu` or `gelu_tanh` (1606.08415)."""
    if activation == "silu":
        return gate_TD / (1 + torch.exp(-gate_TD)) * up_TD
    if activation == "gelu_tanh":
        bend_TD = torch.tanh((2 / torch.pi) ** 0.5 * (gate_TD + 0.044715 * gate_TD**3))
        return 0.5 * gate_TD * (1 + bend_TD) * up_TD
    raise ValueError(f"unknown activation {activation!r}: choose silu or gelu_tanh")


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Returns the rotary embedding, `[T, H, E]` (arXiv 2104.09864), as a product with one matrix a token.

    It turns pairs of one dimension of a head's first half and one of its second half.
    """
    half = x_THE.shape[-1] // 2
    zero, one = x_THE.new_zeros(half, half), torch.eye(half, dtype=x_THE.dtype, device=x_THE.device)
    turned_EE = torch.cat([torch.cat([zero, -one], 1), torch.cat([one, zero], 1)], 0)
    matrix_TEE = torch.diag_embed(cos_TE) + torch.diag_embed(sin_TE) @ turned_EE
    return torch.einsum("tij,thj->thi", matrix_TEE, x_THE)
