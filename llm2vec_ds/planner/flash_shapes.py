"""Attention on the meta device that allocates what fused kernels allocate, so no score matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from llm2vec_kernels.attention.cpu import cpu_attention
from torch import nn

from llm2vec_ds.model.attention import register

NAME = "llm2vec_shapes"


@torch.library.custom_op("llm2vec_ds::attention_shapes", mutates_args=())
def _attention_shapes(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs of every fused kernel: `[T, H, D]`, and a log-sum-exp for each row and head.

    A fused kernel keeps these and its inputs for backward (FlashAttention, arXiv 2205.14135).
    """
    raise NotImplementedError("shapes only")


@_attention_shapes.register_fake
def _(q_THD: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *qkv_THD, _, lse_TH = ctx.saved_tensors
    torch.empty_like(lse_TH)
    return tuple(x.new_empty(x.shape) for x in qkv_THD)


_attention_shapes.register_autograd(_backward, setup_context=_keep)


def register_for_shapes(device_type: str, attention_dropout: float) -> str:
    """Registers an attention that allocates what a run's attention does, and returns its name.

    On a CPU with attention dropout it is the run's own attention, which holds the weights of every pair.
    """
    if device_type == "cpu" and attention_dropout > 0:
        return register("torch")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, partial(_attend, _on_cpu if device_type == "cpu" else _on_gpu))
    AttentionMaskInterface.register(NAME, lambda *_, attention_mask=None, **__: attention_mask)
    return NAME


def _on_gpu(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    out_THD: torch.Tensor = _attention_shapes(q_THD, k_TKD, v_TKD)[0]
    return out_THD


def _on_cpu(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    """Runs the same operation as a training run. All tokens count as one text."""
    cu_seqlens = torch.empty(2, dtype=torch.int32, device=q_THD.device)
    out_THD: torch.Tensor = cpu_attention(q_THD, k_TKD, v_TKD, cu_seqlens, 1.0, None, False)[0]
    return out_THD


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
