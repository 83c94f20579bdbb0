"""The operations of `row_ops` on a GPU. They launch the kernels in `kernels.py`.

Shape legend: T rows (all leading dimensions), D width, P programs, H and K heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from llm2vec_kernels.row_ops.kernels import (
    drop_kernel,
    gated_unit_backward_kernel,
    gated_unit_kernel,
    rms_norm_backward_kernel,
    rms_norm_kernel,
    rotate_kernel,
)

TILE_ELEMENTS = 4096
"""Elements that a program holds, unless a single row has more."""
ELEMENTS_PER_WARP = 1024
DROP_BLOCK = TILE_ELEMENTS // 4
WEIGHT_GRADIENT_PROGRAMS = 512
"""At most this many programs sum the weight's gradient, each over its own rows. Their sums are then added,
always in one order."""


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `row_ops.rms_norm`."""
    _check_shapes(x_TD.shape[-1:], weight_D)
    x_TD = x_TD.contiguous()
    dtype = x_TD.dtype if plus_one else torch.promote_types(x_TD.dtype, weight_D.dtype)
    out_TD = torch.empty_like(x_TD, dtype=dtype)
    inverse_T = x_TD.new_empty(x_TD.shape[:-1], dtype=torch.promote_types(x_TD.dtype, torch.float32))
    if x_TD.numel():
        tile = row_tile(x_TD.shape[-1], x_TD.dtype)
        with torch.cuda.device_of(x_TD):
            rms_norm_kernel[(triton.cdiv(inverse_T.numel(), tile["ROWS"]),)](
                x_TD, weight_D.contiguous(), out_TD, inverse_T, inverse_T.numel(),
                EPS=eps, PLUS_ONE=plus_one, **tile,
            )  # fmt: skip
    return out_TD, inverse_T


def rms_norm_backward(
    d_out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    inverse_T: torch.Tensor,
    weight_is_frozen: bool,
    plus_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `row_ops.rms_norm_backward`."""
    _check_shapes(x_TD.shape[-1:], weight_D)
    _check_shapes(x_TD.shape, d_out_TD)
    d_out_TD, x_TD = d_out_TD.contiguous(), x_TD.contiguous()
    d_x_TD = torch.empty_like(x_TD)
    n_rows, tile = inverse_T.numel(), row_tile(x_TD.shape[-1], x_TD.dtype)
    n_tiles = triton.cdiv(n_rows, tile["ROWS"])
    n_programs = n_tiles if weight_is_frozen else min(n_tiles, WEIGHT_GRADIENT_PROGRAMS)
    n_sums = 0 if weight_is_frozen else n_programs
    sums_PD = inverse_T.new_empty((n_sums, len(weight_D)))
    if x_TD.numel():
        with torch.cuda.device_of(x_TD):
            rms_norm_backward_kernel[(n_programs,)](
                d_out_TD, x_TD, weight_D.contiguous(), inverse_T, d_x_TD, sums_PD, n_rows, n_tiles,
                **tile, PLUS_ONE=plus_one, WEIGHT_IS_FROZEN=weight_is_frozen,
            )  # fmt: skip
    return d_x_TD, weight_D.new_empty(0) if weight_is_frozen else sums_PD.sum(0).to(weight_D.dtype)


def gated_unit(gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """As `row_ops.gated_unit`."""
    _check_shapes(gate_TD.shape, up_TD)
    gate_TD, up_TD = gate_TD.contiguous(), up_TD.contiguous()
    out_TD = torch.empty_like(gate_TD)
    _launch_elementwise(gated_unit_kernel, activation, gate_TD, up_TD, out_TD)
    return out_TD


def gated_unit_backward(
    d_out_TD: torch.Tensor, gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `row_ops.gated_unit_backward`."""
    _check_shapes(gate_TD.shape, up_TD, d_out_TD)
    d_out_TD, gate_TD, up_TD = (x.contiguous() for x in (d_out_TD, gate_TD, up_TD))
    d_gate_TD, d_up_TD = torch.empty_like(gate_TD), torch.empty_like(up_TD)
    tensors = (d_out_TD, gate_TD, up_TD, d_gate_TD, d_up_TD)
    _launch_elementwise(gated_unit_backward_kernel, activation, *tensors)
    return d_gate_TD, d_up_TD


def rotate(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `row_ops.rotate`."""
    n_tokens, q_heads, head_dim = q_THE.shape
    k_heads = k_TKE.shape[1]
    _check_shapes((n_tokens, head_dim), cos_TE, sin_TE)
    _check_shapes((n_tokens, k_heads, head_dim), k_TKE)
    q_THE, k_TKE = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THE, k_TKE))
    turned = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THE, k_TKE)]
    if n_tokens:
        tile = row_tile(head_dim // 2, q_THE.dtype)
        tile["HALF"], tile["BLOCK"] = tile.pop("D"), tile.pop("BLOCK_D")
        with torch.cuda.device_of(q_THE):
            n_tiles = sum(triton.cdiv(n_tokens * heads, tile["ROWS"]) for heads in (q_heads, k_heads))
            rotate_kernel[(n_tiles,)](
                q_THE, k_TKE, cos_TE.contiguous(), sin_TE.contiguous(), *turned,
                *q_THE.stride()[:2], *k_TKE.stride()[:2], n_tokens,
                **tile, Q_HEADS=q_heads, K_HEADS=k_heads, BACKWARD=backward,
            )  # fmt: skip
    return turned[0], turned[1]


def drop(x_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """As `dropout.drop`."""
    x_TD = x_TD.contiguous()
    return _drop(x_TD, torch.empty_like(x_TD), p, mask, add=False)


def add_dropped_(out_TD: torch.Tensor, y_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """As `dropout.add_dropped_`."""
    _check_shapes(out_TD.shape, y_TD)
    if not out_TD.is_contiguous():
        raise ValueError("add_dropped_ adds to a contiguous tensor")
    return _drop(y_TD.contiguous(), out_TD, p, mask, add=True)


def _drop(x_TD: torch.Tensor, out_TD: torch.Tensor, p: float, mask: torch.Tensor, add: bool) -> torch.Tensor:
    n_elements = x_TD.numel()
    if n_elements:
        with torch.cuda.device_of(x_TD):
            drop_kernel[(triton.cdiv(n_elements, 4 * DROP_BLOCK),)](
                x_TD, out_TD, p, mask, n_elements,
                ADD=add, BLOCK=DROP_BLOCK, WIDE=_wide(x_TD.dtype), num_warps=_warps(4 * DROP_BLOCK),
            )  # fmt: skip
    return out_TD


def _check_shapes(expected: Sequence[int], *tensors: torch.Tensor) -> None:
    """Checks shapes, because a kernel would read and write past the end of a smaller tensor.

    An example is a weight that ZeRO-3 has not gathered.

    Raises:
        ValueError: a tensor has another shape.
    """
    for tensor in tensors:
        if tensor.shape != tuple(expected):
            raise ValueError(f"shape {tuple(tensor.shape)} does not fit: {tuple(expected)} is needed")


def row_tile(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns a tile of whole rows: as many as make `TILE_ELEMENTS`, and at least one."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE_ELEMENTS // block)
    return {
        "D": width,
        "ROWS": rows,
        "BLOCK_D": block,
        "WIDE": _wide(dtype),
        "num_warps": _warps(rows * block),
    }


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _warps(n_elements: int) -> int:
    return min(16, max(1, n_elements // ELEMENTS_PER_WARP))


def _launch_elementwise(kernel: triton.JITFunction, activation: str, *tensors: torch.Tensor) -> None:
    n_elements = tensors[0].numel()
    gelu = {"silu": False, "gelu_tanh": True}[activation]
    if n_elements:
        with torch.cuda.device_of(tensors[0]):
            kernel[(triton.cdiv(n_elements, TILE_ELEMENTS),)](
                *tensors, n_elements, GELU=gelu, BLOCK=TILE_ELEMENTS, WIDE=_wide(tensors[0].dtype),
                num_warps=_warps(TILE_ELEMENTS),
            )  # fmt: skip
