"""RMSNorm, gated units and rotary embedding on a CPU. A few rows at a time go through all steps in cache.

Shape legend: T tokens (or any leading dimensions), D width, H and K heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

ELEMENTS_PER_THREAD = 2**17
"""Elements of a chunk: half a MiB in fp32. Smaller chunks fit a nearer cache, but then the start of each
operation counts more."""

FEW_ELEMENTS = 2**16
"""Up to this size, starting an operation costs more than moving its memory."""

Tensors = tuple[torch.Tensor, ...]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm_dtype(x: torch.Tensor, weight: torch.Tensor, plus_one: bool) -> torch.dtype:
    return x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _in_chunks(
    work: Callable[..., Tensors], inputs: Tensors, outputs: Sequence[tuple[Sequence[int], torch.dtype]]
) -> Tensors:
    """Runs `work(*inputs, *outputs)` on a few rows at a time and returns the outputs.

    A single chunk of one dtype gets no outputs: `work` makes them, which saves operations.

    Args:
        work: writes to the outputs that it is given, or makes them.
        inputs: tensors with the same number of rows. The first is at least as wide as the others.
        outputs: the row shape and the dtype of each output.
    """
    first = inputs[0]
    n_elements = ELEMENTS_PER_THREAD * torch.get_num_threads()
    if first.numel() <= n_elements and _is_wide(first) and all(dtype == first.dtype for _, dtype in outputs):
        return work(*inputs)
    n_rows = len(first)
    per_chunk = max(1, n_elements * n_rows // max(1, first.numel()))
    made = tuple(first.new_empty(n_rows, *shape, dtype=dtype) for shape, dtype in outputs)
    for parts in zip(*(tensor.split(per_chunk) for tensor in (*inputs, *made)), strict=True):
        work(*parts)
    return made


def _is_wide(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _are_few(x: torch.Tensor) -> bool:
    """Whether torch's own operations are fastest: few elements, and nothing to round on the way."""
    return x.numel() <= FEW_ELEMENTS and _is_wide(x)


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.rms_norm`."""
    if not plus_one and _are_few(x_TD) and weight_D.dtype == x_TD.dtype:
        out_TD, inverse_T1 = torch.ops.aten._fused_rms_norm(x_TD, weight_D.shape, weight_D, eps)
        return out_TD, inverse_T1.squeeze(-1)
    width, wide = x_TD.shape[-1], wide_dtype(x_TD.dtype)
    factor_D = weight_D.to(wide) + 1 if plus_one else weight_D

    def work(
        x: torch.Tensor, out: torch.Tensor | None = None, inverse: torch.Tensor | None = None
    ) -> Tensors:
        widened = x if out is None else x.to(wide)
        inverse = torch.linalg.vector_norm(widened, dim=1, keepdim=True, out=inverse)
        inverse.square_().div_(width).add_(eps).rsqrt_()
        if plus_one:
            return torch.mul(widened * inverse, factor_D, out=out), inverse
        out = torch.mul(widened, inverse, out=out)
        if out.dtype != x.dtype:
            out.copy_(out.to(x.dtype))
        return out.mul_(factor_D), inverse

    made = (((width,), rms_norm_dtype(x_TD, weight_D, plus_one)), ((1,), wide))
    out_TD, inverse_T1 = _in_chunks(work, (_rows(x_TD),), made)
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
    wide = inverse_T.dtype
    factor_D = weight_D.to(wide)
    if plus_one:
        factor_D = factor_D + 1
    d_weight_D = weight_D.new_zeros(0 if weight_is_frozen else len(weight_D), dtype=wide)

    def work(
        x: torch.Tensor, d_out: torch.Tensor, inverse: torch.Tensor, d_x: torch.Tensor | None = None
    ) -> Tensors:
        normal = x * inverse
        if not weight_is_frozen:
            d_weight_D.add_((d_out * normal).sum(0))
        g = d_out.to(wide) * factor_D
        mean = (g * normal).mean(1, keepdim=True)
        return (torch.mul(g.addcmul_(normal, mean, value=-1), inverse, out=d_x),)

    inputs = (_rows(x_TD), _rows(d_out_TD), inverse_T.reshape(-1, 1))
    (d_x_TD,) = _in_chunks(work, inputs, [((x_TD.shape[-1],), x_TD.dtype)])
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
"""The activation, and its derivative times d. Each writes to `out`."""
_ACTIVATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated_unit(gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """As `api.gated_unit`."""
    if _are_few(gate_TD):
        return _ACTIVATED[activation](gate_TD).mul_(up_TD)
    activate, _ = _ACTIVATIONS[activation]

    def work(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> Tensors:
        out = torch.empty_like(gate) if out is None else out
        activate(gate, out)
        return (out.mul_(up),)

    made = [((gate_TD.shape[-1],), gate_TD.dtype)]
    (out_TD,) = _in_chunks(work, (_rows(gate_TD), _rows(up_TD)), made)
    return out_TD.view(gate_TD.shape)


def gated_unit_backward(
    d_out_TD: torch.Tensor, gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.gated_unit_backward`."""
    activate, differentiate = _ACTIVATIONS[activation]

    def work(
        gate: torch.Tensor,
        up: torch.Tensor,
        d_out: torch.Tensor,
        d_gate: torch.Tensor | None = None,
        d_up: torch.Tensor | None = None,
    ) -> Tensors:
        d_up = torch.empty_like(gate) if d_up is None else d_up
        activate(gate, d_up)
        d_up.mul_(d_out)
        d_gate = torch.mul(d_out, up, out=d_gate)
        differentiate(d_gate, gate, d_gate)
        return d_gate, d_up

    made = 2 * [((gate_TD.shape[-1],), gate_TD.dtype)]
    inputs = (_rows(gate_TD), _rows(up_TD), _rows(d_out_TD))
    d_gate_TD, d_up_TD = _in_chunks(work, inputs, made)
    return d_gate_TD.view(gate_TD.shape), d_up_TD.view(gate_TD.shape)


def rotate(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `api.rotate`."""
    sign = -1 if backward else 1

    # Forward: (a · cos_a − b · sin_a, b · cos_b + a · sin_b). The transposed rotation flips the sign and
    # swaps the halves of sin: (a · cos_a + b · sin_b, b · cos_b − a · sin_a).
    def turn(x: torch.Tensor, cos: torch.Tensor, sins: Tensors, out: torch.Tensor | None) -> torch.Tensor:
        out = torch.mul(x, cos, out=out)
        (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
        out_a.addcmul_(b, sins[0], value=-sign)
        out_b.addcmul_(a, sins[1], value=sign)
        return out

    def work(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        turned_q: torch.Tensor | None = None,
        turned_k: torch.Tensor | None = None,
    ) -> Tensors:
        cos, sins = cos.unsqueeze(1), sin.unsqueeze(1).chunk(2, -1)
        if backward:
            sins = sins[::-1]
        return turn(q, cos, sins, turned_q), turn(k, cos, sins, turned_k)

    made = [(x.shape[1:], x.dtype) for x in (q_THE, k_TKE)]
    turned = _in_chunks(work, (q_THE, k_TKE, cos_TE, sin_TE), made)
    return turned[0], turned[1]
