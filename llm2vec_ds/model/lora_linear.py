"""A linear layer and its LoRA adapter as one operation (Hu et al., 2021, arXiv 2106.09685).

peft computes LoRA step by step. That passes over the wide output four more times: the update is written,
scaled and added, and its gradient is scaled. Here the matrix product that makes the update also scales it and
adds it to the output. The update's part of the input's gradient is added in the same way.

Backward does not keep the dropped copy of the input. It makes it again from the input and the mask
(`row_ops/dropout.py`).

Shape legend: T tokens (any leading dimensions, or none), I and O width of input and output, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from llm2vec_kernels.operation import Operation
from llm2vec_kernels.products import product, times
from llm2vec_kernels.row_ops.dropout import add_dropped_
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm2vec_ds.model.cpu_linear import CpuLinear
from llm2vec_ds.model.input_dropout import InputDropout
from llm2vec_ds.model.origins import how_to_keep


def _lora_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
    dropped_TI: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x · Wᵀ + bias + scale / (1 − p) · (d · Aᵀ) · Bᵀ (equation 3 of the paper), and d · Aᵀ.

    Backward needs d · Aᵀ.

    Args:
        dropped_TI: d, which is x with zeros where `mask` drops (`row_ops/dropout.py`). None stands for x. d
            itself gets no gradient: x gets the gradient that passes through d.
        dropout_p: p, the probability of dropping an element.

    Returns:
        `[T, O]` and `[T, R]`, in the dtype of all tensors.
    """
    rows_TI = _rows(x_TI)
    low_TR = product(rows_TI if dropped_TI is None else _rows(dropped_TI), a_RI)
    # Not `functional.linear`: DeepSpeed replaces it by a version that rounds in another place.
    out_TO = product(rows_TI, weight_OI, bias_O)
    out_TO.addmm_(low_TR, b_OR.t(), alpha=scale / (1 - dropout_p))
    return out_TO.view(*x_TI.shape[:-1], out_TO.shape[1]), low_TR


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _shapes(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, _: Any, a_RI: torch.Tensor, *__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    leading = x_TI.shape[:-1]
    return x_TI.new_empty(*leading, len(weight_OI)), x_TI.new_empty(leading.numel(), len(a_RI))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_TI, weight_OI, _, a_RI, b_OR, scale, dropped_TI, mask, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.scale = scale / (1 - ctx.dropout_p)
    # Only d is needed. `kept` holds what it is made of, if that is known, and `again` makes it.
    ctx.again, kept = how_to_keep(x_TI if dropped_TI is None else dropped_TI)
    ctx.save_for_backward(output[1], weight_OI, a_RI, b_OR, mask, *kept)


def _backward(
    ctx: Any, d_out_TO: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if d_out_TO is None:
        return (None,) * 9
    low_TR, weight_OI, a_RI, b_OR, mask, *kept = ctx.saved_tensors
    adapted_TI = ctx.again(*kept)
    needs_x, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    if needs_weight or needs_bias:
        raise RuntimeError("lora_linear is for a frozen weight and bias: they would get no gradient")
    # With s = scale / (1 − p) and Y = X·Wᵀ + bias + s·(D·Aᵀ)·Bᵀ:
    #   dX = dY·W + mask(s·dY·B·A),  dA = (s·dY·B)ᵀ·D,  dB = s·dYᵀ·(D·Aᵀ).
    flat_TO = _rows(d_out_TO)
    d_low_TR = times(flat_TO, b_OR, ctx.scale, like_TO=low_TR)
    d_x_TI = d_a_RI = d_b_OR = None
    if needs_x:
        d_x_TI = times(flat_TO, weight_OI)
        if mask is None:
            d_x_TI.addmm_(d_low_TR, a_RI)
        else:
            add_dropped_(d_x_TI, times(d_low_TR, a_RI), ctx.dropout_p, mask)
        d_x_TI = d_x_TI.view(adapted_TI.shape)
    if needs_a:
        d_a_RI = times(d_low_TR.t(), _rows(adapted_TI))
    if needs_b:
        d_b_OR = times(flat_TO.t(), low_TR, ctx.scale, like_TO=b_OR)
    return d_x_TI, None, None, d_a_RI, d_b_OR, None, None, None, None


lora_linear = Operation("llm2vec_ds::lora_linear", _lora_linear, _shapes).with_gradient(_keep, _backward)


class _Plain(NamedTuple):
    """The one adapter that is fused with its layer. Valid while the layer has these settings and modules."""

    settings: tuple[Any, ...]
    adapter: str
    base: nn.Module
    a: nn.Module
    b: nn.Module
    dropout: nn.Module

    @property
    def dropout_p(self) -> float:
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0

    def tensors(self) -> tuple[Any, ...]:
        """Returns weight, bias, A and B. Attribute access on a module would take ten times as long."""
        base = self.base._parameters
        return base["weight"], base["bias"], self.a._parameters["weight"], self.b._parameters["weight"]


class LoraLinear(PeftLoraLinear):
    """peft's LoRA layer. Its forward is one operation if exactly one plain adapter is active."""

    gathers_weights = False
    """Whether ZeRO-3 gathers the weights of inner modules for this module's forward."""
    dropouts: InputDropout
    """The dropout masks that the layers of a trunk share."""
    _plain: _Plain | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = self._plain_adapter(x.dtype)
        if plain is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        dropout_p = plain.dropout_p if self.training else 0.0
        out: torch.Tensor = lora_linear(
            x,
            *plain.tensors(),
            self.scaling[plain.adapter],
            *(self.dropouts.of(x, dropout_p) if dropout_p else ()),
        )[0]
        return out

    def only_adapter(self, dtype: torch.dtype) -> str | None:
        """Returns the name of the adapter that is fused with its layer for inputs of `dtype`.

        None if `lora_linear` cannot do it: adapters that are merged, switched off or stacked, variants
        (DoRA), adapters with biases, mixed dtypes, weights that train, and weights that ZeRO-3 has
        partitioned and does not gather here.
        """
        plain = self._plain_adapter(dtype)
        return None if plain is None else plain.adapter

    def is_plain(self) -> bool:
        """Says whether exactly one plain adapter is active, of any dtype."""
        return self._find_plain_adapter(()) is not None

    def _plain_adapter(self, dtype: torch.dtype) -> _Plain | None:
        """Returns the plain adapter for inputs of `dtype`.

        The result is kept until peft changes the layer, because a model has hundreds of such layers.
        """
        plain = self._plain
        settings = (self._active_adapter, self._disable_adapters, *self.merged_adapters)
        if plain is None or plain.settings != settings or not self._still_has(plain):
            self._plain = plain = self._find_plain_adapter(settings)
        if plain is None:
            return None
        weight, bias, *adapter = plain.tensors()
        tensors = (weight, *adapter)
        if weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype != dtype)):
            return None
        if any(tensor.dtype != dtype for tensor in tensors):
            return None
        if not self.gathers_weights and any(hasattr(tensor, "ds_id") for tensor in tensors):
            return None
        return plain

    def _still_has(self, plain: _Plain) -> bool:
        """Returns False if the adapter was deleted and another one of the same name took its place."""
        a, b, dropout = (
            self._modules[part]._modules.get(plain.adapter) for part in ("lora_A", "lora_B", "lora_dropout")
        )
        return a is plain.a and b is plain.b and dropout is plain.dropout

    def _find_plain_adapter(self, settings: tuple[Any, ...]) -> _Plain | None:
        if self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        a, b, dropout = self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter]
        return _Plain(settings, adapter, self.get_base_layer(), a, b, dropout)


def lora_linear_for(target: nn.Module, adapter_name: str, **options: Any) -> LoraLinear | None:
    """Makes a `LoraLinear` for a plain linear layer. None leaves the layer to peft, which calls this."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return LoraLinear(target, adapter_name, **options) if type(base) in (nn.Linear, CpuLinear) else None


def share_dropout(trunk: nn.Module) -> None:
    """Lets the layers of `trunk` that read the same tensor share one dropout mask."""
    layers = [layer for layer in trunk.modules() if isinstance(layer, LoraLinear)]
    shared = next((layer.dropouts for layer in layers if "dropouts" in layer.__dict__), None)
    if shared is None and layers:
        shared = InputDropout()
        shared.follow(trunk)
    for layer in layers:
        layer.dropouts = shared  # type: ignore[assignment]
