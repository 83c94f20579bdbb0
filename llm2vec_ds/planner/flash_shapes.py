"""Attention on the meta device that allocates what the fused kernels do: no score matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llm2vec_ds.model.attention import register

NAME = "llm2vec_shapes"


class _FlashShapes(torch.autograd.Function):
    """`[T, H, D]` in and out; keeps q, k, v, the output and a log-sum-exp a row and head, as every fused
    kernel does (FlashAttention, arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, *qkv_THD: torch.Tensor) -> torch.Tensor:
        query = qkv_THD[0]
        out_THD = query.new_empty(query.shape)
        ctx.save_for_backward(*qkv_THD, out_THD, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_THD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *qkv_THD, _, lse_TH = ctx.saved_tensors
        torch.empty_like(lse_TH)
        return tuple(x.new_empty(x.shape) for x in qkv_THD)


def register_for_shapes(device_type: str, attention_dropout: float) -> str:
    """Name of the attention that needs what a run's would; on a CPU with dropout the run's own, which holds
    the weights of every pair."""
    if device_type == "cpu" and attention_dropout > 0:
        return register("torch")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(
        NAME, partial(_attend, _on_cpu if device_type == "cpu" else _FlashShapes.apply)
    )
    AttentionMaskInterface.register(NAME, lambda *_, attention_mask=None, **__: attention_mask)
    return NAME


def _on_cpu(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor) -> torch.Tensor:
    """The very operation, which selective activation checkpointing keeps; SDPA on meta would take another."""
    heads_first = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    out_THD: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)[0]
    return out_THD[0].transpose(0, 1)


def _attend(
    attention: Any,
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHLD, key_BHLD, value_BHLD))
    return attention(q, k, v).unflatten(0, (query_BHLD.shape[0], query_BHLD.shape[2])), None
