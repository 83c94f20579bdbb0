"""A linear layer and its LoRA adapter as one operation (Hu et al., 2021, arXiv 2106.09685).

Spelt out layer by layer, as peft does it, LoRA passes over the wide output four more times: the update is
written, scaled and added, and its gradient scaled. Here the update is accumulated into the output by the
matrix product that makes it, and so is its part of the input's gradient; the scale rides along.

One operation (`llm2vec_kernels.operation`), so that selective activation checkpointing can keep its result.

Shape legend: T tokens (any leading dimensions, or none), I and O width of input and output, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from llm2vec_kernels.operation import Operation
from llm2vec_kernels.products import product
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm2vec_ds.model.cpu_linear import CpuLinear


def _lora_linear(
    x_TI: torch.Tensor,
    dropped_TI: torch.Tensor | None,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x · Wᵀ + bias + scale · (d · Aᵀ) · Bᵀ, and d · Aᵀ for backward.

    Args:
        dropped_TI: d, the input after the adapter's dropout; None: x itself.

    Returns:
        `[T, O]` and `[T, R]`, in the dtype of all tensors.
    """
    rows_TI = _rows(x_TI)
    low_TR = product(rows_TI if dropped_TI is None else _rows(dropped_TI), a_RI)
    # Not functional.linear, which DeepSpeed replaces by one that rounds in another place.
    out_TO = product(rows_TI, weight_OI, bias_O)
    out_TO.addmm_(low_TR, b_OR.T, alpha=scale)
    leading = x_TI.shape[:-1]
    return out_TO.view(*leading, len(weight_OI)), low_TR.view(*leading, len(a_RI))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _shapes(
    x_TI: torch.Tensor, dropped_TI: Any, weight_OI: torch.Tensor, bias_O: Any, a_RI: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    leading = x_TI.shape[:-1]
    return x_TI.new_empty(*leading, len(weight_OI)), x_TI.new_empty(*leading, len(a_RI))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TI, dropped_TI, weight_OI, _, a_RI, b_OR, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    adapted_TI = x_TI if dropped_TI is None else dropped_TI
    ctx.save_for_backward(adapted_TI, output[1], weight_OI, a_RI, b_OR)
    ctx.has_dropout = dropped_TI is not None


def _backward(
    ctx: Any, d_out_TO: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if d_out_TO is None:
        return (None,) * 7
    adapted_TI, low_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
    needs_x, needs_dropped, needs_weight, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
    if needs_weight or needs_bias:
        raise RuntimeError("lora_linear is for a frozen weight and bias: they would get no gradient")
    leading = d_out_TO.shape[:-1]
    flat_TO = _rows(d_out_TO)
    d_low_TR = product(flat_TO, b_OR.T).mul_(ctx.scale)
    d_x_TI = d_dropped_TI = d_a_RI = d_b_OR = None
    if needs_x:
        d_x_TI = product(flat_TO, weight_OI.T)
        if not ctx.has_dropout:
            d_x_TI.addmm_(d_low_TR, a_RI)
        d_x_TI = d_x_TI.view(*leading, a_RI.shape[1])
    if needs_dropped:
        d_dropped_TI = product(d_low_TR, a_RI.T).view(*leading, a_RI.shape[1])
    if needs_a:
        d_a_RI = product(d_low_TR.T, _rows(adapted_TI).T)
    if needs_b:
        d_b_OR = product(flat_TO.T, (_rows(low_TR) * ctx.scale).T)
    return d_x_TI, d_dropped_TI, None, None, d_a_RI, d_b_OR, None


lora_linear = Operation("llm2vec_ds::lora_linear", _lora_linear, _shapes).with_gradient(_keep, _backward)


class LoraLinear(PeftLoraLinear):
    """peft's LoRA layer, whose forward is one operation where there is one plain adapter to apply."""

    gathers_weights = False
    """Has ZeRO-3 been told that this module's forward uses the weights of the modules in it?"""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = self.only_adapter(x.dtype)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        dropout = self.lora_dropout[adapter]
        has_dropout = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        out: torch.Tensor = lora_linear(
            x,
            dropout(x) if has_dropout else None,
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
        )[0]
        return out

    def only_adapter(self, dtype: torch.dtype) -> str | None:
        """The adapter that is one operation with its layer for inputs of `dtype`.

        None for what `lora_linear` does not do: merged, switched off or stacked adapters, variants (DoRA),
        biases, mixed dtypes, weights that train, or that ZeRO-3 has partitioned and does not gather here.
        """
        if self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        base = self.get_base_layer()
        weight, bias = base.weight, base.bias
        tensors = (weight, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        if weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype != dtype)):
            return None
        if any(tensor.dtype != dtype for tensor in tensors):
            return None
        if not self.gathers_weights and any(hasattr(tensor, "ds_id") for tensor in tensors):
            return None
        return adapter


def lora_linear_for(target: nn.Module, adapter_name: str, **options: Any) -> LoraLinear | None:
    """A `LoraLinear` for a plain linear layer, for peft's table of custom layers; None leaves it to peft."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return LoraLinear(target, adapter_name, **options) if type(base) in (nn.Linear, CpuLinear) else None
