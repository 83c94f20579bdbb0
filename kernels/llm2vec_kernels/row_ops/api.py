"""RMSNorm, rotary embedding and gated units: the layer's steps between matrix products, one operation each.

In plain PyTorch, each of them writes and reads several tensors as large as the activations, and keeps some
for backward. Here a few rows at a time go through all steps, in the processor's cache or in a GPU's registers
(`triton.py`). Backward recomputes what is cheap. RMSNorm keeps its input and one number a row. A gated unit
keeps its two inputs. The rotary embedding keeps nothing of its inputs.

Each is one `Operation` (`operation.py`), so selective activation checkpointing sees one operation, not many.

Shape legend: T tokens (or any leading dimensions), D width, H and K heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from llm2vec_kernels.devices import runs_triton
from llm2vec_kernels.operation import Operation
from llm2vec_kernels.row_ops import cpu
from llm2vec_kernels.row_ops.cpu import rms_norm_dtype, wide_dtype


def runs_on(device: torch.device) -> bool:
    """Whether the operations run on this device. On meta they return shapes."""
    return device.type in ("cpu", "meta") or runs_triton(device)


def _operations(x: torch.Tensor) -> Any:
    """Returns the module that computes on x's device."""
    if not x.is_cuda:
        return cpu
    from llm2vec_kernels.row_ops import triton  # here, for machines without Triton

    return triton


def _rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes weight · x / √(mean x² + eps) (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    It computes in fp32 or wider. The normalised row is rounded to x's dtype before it meets the weight, as in
    transformers' Llama.

    Args:
        plus_one: use weight + 1 and round only the result, as in Gemma.

    Returns:
        `[T, D]` in the wider dtype of x and weight (`plus_one`: in x's), and 1 / √(mean x² + eps) `[T]` for
        backward.
    """
    outcome: Any = _operations(x_TD).rms_norm(x_TD, weight_D, eps, plus_one)
    return outcome


def _rms_norm_shapes(
    x: torch.Tensor, weight: torch.Tensor, _: Any, plus_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape, dtype=rms_norm_dtype(x, weight, plus_one))
    return out, x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def _rms_norm_backward(
    d_out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    inverse_T: torch.Tensor,
    weight_is_frozen: bool,
    plus_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x `[T, D]` and of the weight `[D]` (`[0]` if it is frozen).

    With n = x · inverse and g = d_out · weight, they are inverse · (g − n · mean(g · n)) and Σ_T d_out · n.
    """
    outcome: Any = _operations(d_out_TD).rms_norm_backward(
        d_out_TD, x_TD, weight_D, inverse_T, weight_is_frozen, plus_one
    )
    return outcome


def _rms_norm_gradient_shapes(
    _: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, __: Any, weight_is_frozen: bool, *___: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(0 if weight_is_frozen else len(weight))


def _gated_unit(gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """Computes activation(gate) · up, `[T, D]` (Shazeer, 2020, arXiv 2002.05202).

    The activation is rounded to gate's dtype before the product.

    Args:
        activation: `silu` (SwiGLU) or `gelu_tanh` (GeGLU, with GELU approximated by tanh: Hendrycks and
            Gimpel, 2016, arXiv 1606.08415).
    """
    outcome: Any = _operations(gate_TD).gated_unit(gate_TD, up_TD, activation)
    return outcome


def _gated_unit_shapes(gate: torch.Tensor, up: torch.Tensor, _: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _gated_unit_backward(
    d_out_TD: torch.Tensor, gate_TD: torch.Tensor, up_TD: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up, `[T, D]`."""
    outcome: Any = _operations(d_out_TD).gated_unit_backward(d_out_TD, gate_TD, up_TD, activation)
    return outcome


def _gated_unit_gradient_shapes(
    _: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, __: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _rotate(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies rotary position embedding to queries and keys (Su et al., 2021, arXiv 2104.09864).

    A dimension of a head's first half and one of its second half make a pair, as in transformers' Llama. With
    x = (a, b) the result is (a · cos − b · sin, b · cos + a · sin).

    Args:
        backward: rotate the other way. The transposed rotation takes a gradient back.
    """
    outcome: Any = _operations(q_THE).rotate(q_THE, k_TKE, cos_TE, sin_TE, backward)
    return outcome


def _rotate_shapes(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


rms_norm_backward = Operation("llm2vec::rms_norm_backward", _rms_norm_backward, _rms_norm_gradient_shapes)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TD, weight_D, _, ctx.plus_one = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_D, output[1])


def _differentiate_rms_norm(
    ctx: Any, d_out_TD: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    if d_out_TD is None:
        return None, None, None, None
    needs_weight = ctx.needs_input_grad[1]
    d_x_TD, d_weight_D = rms_norm_backward(d_out_TD, *ctx.saved_tensors, not needs_weight, ctx.plus_one)
    return d_x_TD, d_weight_D if needs_weight else None, None, None


rms_norm = Operation("llm2vec::rms_norm", _rms_norm, _rms_norm_shapes).with_gradient(
    _keep_rms_norm, _differentiate_rms_norm
)


gated_unit_backward = Operation(
    "llm2vec::gated_unit_backward", _gated_unit_backward, _gated_unit_gradient_shapes
)


def _keep_gated_unit(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate_TD, up_TD, ctx.activation = inputs
    ctx.save_for_backward(gate_TD, up_TD)


def _differentiate_gated_unit(ctx: Any, d_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*gated_unit_backward(d_out_TD, *ctx.saved_tensors, ctx.activation), None)


gated_unit = Operation("llm2vec::gated_unit", _gated_unit, _gated_unit_shapes).with_gradient(
    _keep_gated_unit, _differentiate_gated_unit
)


def _keep_rotate(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, cos_TE, sin_TE, ctx.backward = inputs
    ctx.save_for_backward(cos_TE, sin_TE)


def _differentiate_rotate(
    ctx: Any, d_q_THE: torch.Tensor, d_k_TKE: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    return (*rotate(d_q_THE, d_k_TKE, *ctx.saved_tensors, not ctx.backward), None, None, None)


rotate = Operation("llm2vec::rotate", _rotate, _rotate_shapes).with_gradient(
    _keep_rotate, _differentiate_rotate
)
