"""Linear layers of an fp32 trunk on a CPU, computed by the faster library of matrix products.

Shape legend: T rows, I and O width of input and output.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from llm2vec_kernels.products import cpu_products, is_for_onednn, product
from torch import nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)


class CpuLinear(nn.Linear):
    """A linear layer whose forward and backward call `product`. With an adapter, `lora_linear` runs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._is_left_to_torch(input):
            return super().forward(input)
        out: torch.Tensor = _Linear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _is_left_to_torch(self, input: torch.Tensor) -> bool:
        """True for small products, mixed dtypes, tracing, compiling, autocast, and weights under ZeRO-3."""
        return (
            torch.compiler.is_compiling()
            or not is_for_onednn(input, self.out_features)
            or self.weight.dtype != input.dtype
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
            or hasattr(self.weight, "ds_id")
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight_OI)
        return product(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(d_out_TO, weight_OI.T) if needs_x else None,
            product(d_out_TO.T, x_TI.T) if needs_weight else None,
            d_out_TO.sum(0) if needs_bias else None,
        )


def use_fast_products(trunk: nn.Module, device: torch.device) -> None:
    """Changes the class of each fp32 linear layer on a CPU if oneDNN is chosen. Logs the chosen library."""
    if device.type != "cpu":
        return
    chosen = cpu_products()
    log.info("fp32 matrix products by %s (%s)", chosen.name, chosen.reason)
    if chosen.environment:
        log.debug("environment for oneDNN: %s", chosen.environment)
    if chosen.name != "oneDNN":
        return
    for module in trunk.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = CpuLinear
