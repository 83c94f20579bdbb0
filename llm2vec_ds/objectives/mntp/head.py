"""The language head of masked next token prediction (MNTP).

The hidden state at i−1 predicts the masked token at i (BehnamGhader et al., 2024, arXiv 2404.05961,
section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from llm2vec_kernels.products import product
from torch import nn
from torch.autograd.function import once_differentiable

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.encoder.encoder import Encoder


class MaskedTokenHead(nn.Module):
    """Runs the language head on masked rows only, in chunks: it holds logits of `chunk_tokens` rows at most.

    The weight is the model's own, frozen or tied as the model has it. This module owns it directly. So ZeRO-3
    gathers it once a call, however many chunks a rank has. The head follows these keys of the config:
    `final_logit_softcapping` (Gemma 2), `logits_scaling` (Granite, a divisor) and `logit_scale` (Cohere, a
    factor).
    """

    def __init__(self, head: nn.Linear, config: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self.factor: float = (factor or 1.0) / (divisor or 1.0)
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden_MD: torch.Tensor, label_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cross-entropy `[M]` fp32, and whether the likeliest token is right `[M]` bool."""
        return _HeadLoss.apply(
            hidden_MD, label_M, self.weight, self.bias, self.softcap, self.factor, self.chunk_tokens
        )


class _HeadLoss(torch.autograd.Function):
    """Computes loss and hit of each row, chunk by chunk.

    A row's loss depends on its own hidden state only. So forward can compute the gradient of that hidden
    state while it holds the logits. Only the upstream factor is missing, and backward multiplies by it. A
    frozen head then costs two matrix products; a checkpointed chunk would cost three. ZeRO-3 gathers the
    weight once. If the head trains, backward computes the logits again for the gradient of its weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        label_M: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        d_hidden_MD = torch.empty_like(hidden_MD)
        losses, hits = [hidden_MD.new_zeros(0).float()], [label_M.new_zeros(0).bool()]
        for hidden, label, d_hidden in _chunks(options, hidden_MD, label_M, d_hidden_MD):
            loss, hit, d_logits = _chunk(hidden, label, weight_VD, bias_V, options)
            losses.append(loss)
            hits.append(hit)
            if ctx.needs_input_grad[0]:
                d_hidden.copy_(product(d_logits, weight_VD.T))
        saved_MD = d_hidden_MD if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(hidden_MD, label_M, weight_VD, bias_V, saved_MD)
        ctx.options = options
        hit_M = torch.cat(hits)
        ctx.mark_non_differentiable(hit_M)
        return torch.cat(losses), hit_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_M: torch.Tensor, unused: None) -> tuple[torch.Tensor | None, ...]:
        hidden_MD, label_M, weight_VD, bias_V, d_hidden_MD = ctx.saved_tensors
        if d_hidden_MD is not None:
            d_hidden_MD = (d_hidden_MD * weight_M[:, None]).to(hidden_MD.dtype)
        d_weight_VD: torch.Tensor | None = None
        d_bias_V: torch.Tensor | None = None
        if any(ctx.needs_input_grad[2:4]):
            d_weight_VD = torch.zeros_like(weight_VD)
            d_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
            for hidden, label, weight in _chunks(ctx.options, hidden_MD, label_M, weight_M):
                _, _, d_logits = _chunk(hidden, label, weight_VD, bias_V, ctx.options)
                d_logits *= weight[:, None].to(d_logits.dtype)
                torch.addmm(d_weight_VD, d_logits.T, hidden, out=d_weight_VD)
                if d_bias_V is not None:
                    d_bias_V += d_logits.sum(0)
        return d_hidden_MD, None, d_weight_VD, d_bias_V, None, None, None


def _chunks(options: tuple[Any, ...], *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    chunk_tokens = options[-1]
    return zip(*(x.split(chunk_tokens) for x in tensors), strict=True) if len(tensors[0]) else iter(())


def _chunk(
    hidden: torch.Tensor,
    label: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    options: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss, hit, and ∂loss/∂(hidden · weightᵀ) in the weight's dtype. Logits and softmax are fp32."""
    softcap, factor, _ = options
    logits = product(hidden, weight_VD, bias_V).float().mul_(factor)
    slope: torch.Tensor | float = factor
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1).mul_(factor)  # d tanh(x)/dx = 1 − tanh²(x)
        logits.mul_(softcap)
    # The softmax runs in place. `logsumexp` would hold the logits twice and compute exp twice.
    highest, likeliest = logits.max(-1, keepdim=True)
    label = label[:, None]
    target = logits.gather(-1, label) - highest
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    loss = total.log() - target
    d_logits = logits.div_(total).scatter_add_(-1, label, -torch.ones_like(loss)).mul_(slope)
    return loss[:, 0], (likeliest == label)[:, 0], d_logits.to(weight_VD.dtype)


class MntpModel(nn.Module):
    """Encoder and head in one module, which the engine trains."""

    def __init__(self, encoder: Encoder, head: MaskedTokenHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns loss `[M]` and hit `[M]` of the M masked tokens, in stream order.

        A text's first token never has a label, so i−1 is always in the same text.
        """
        if batch.labels is None or batch.predicted is None:
            raise ValueError("this batch has no labels: pass labels to `pack`")
        hidden_TD = self.encoder.hidden_states(batch)
        outcome: tuple[torch.Tensor, torch.Tensor] = self.head(
            hidden_TD[batch.predicted - 1], batch.labels[batch.predicted]
        )
        return outcome
