"""Linear layers of a trunk on a CPU that use the faster matrix product where no graph is asked for."""

from __future__ import annotations

import logging

import torch
from llm2vec_kernels.cpu_products import cpu_products, product, takes_onednn
from torch import nn

log = logging.getLogger(__name__)


class CpuLinear(nn.Linear):
    """A linear layer by `product` under `torch.no_grad`: encoding, and the passes that only make embeddings.

    Layers that train have adapters, whose operation (`lora_linear`) uses `product` itself; one without
    adapter stays PyTorch's in training.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or not takes_onednn(input) or self.weight.dtype != input.dtype:
            return super().forward(input)
        out = product(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)


def use_fast_products(trunk: nn.Module, device: torch.device) -> None:
    """Changes the class of each plain linear layer on a CPU; logs what computes the products there."""
    if device.type != "cpu":
        return
    chosen = cpu_products()
    log.info("fp32 matrix products by %s (%s)", chosen.name, chosen.reason)
    for module in trunk.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
