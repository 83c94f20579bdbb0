"""Pools the token vectors of a packed stream into one vector a text, without a loop over texts.

Shape legend: T tokens of all texts, S texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llm2vec_ds.batch import PackedBatch


def mean_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Averages the tokens in `pool_mask`."""
    return _weighted(hidden_TD, batch, batch.pool_mask.to(_wide(hidden_TD)))


def weighted_mean_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Averages the tokens in `pool_mask` with weights 1, 2, … in their order (SGPT, arXiv 2202.08904)."""
    counted_T = batch.pool_mask.cumsum(0)
    before_S = torch.cat([counted_T.new_zeros(1), counted_T])[batch.cu_seqlens[:-1].long()]
    rank_T = counted_T - before_S[batch.segment_ids()]
    return _weighted(hidden_TD, batch, (rank_T * batch.pool_mask).to(_wide(hidden_TD)))


def last_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Takes the last token in `pool_mask`."""
    token_T = torch.arange(batch.n_tokens, device=hidden_TD.device) * batch.pool_mask
    last_S = token_T.new_zeros(batch.n_texts).scatter_reduce(0, batch.segment_ids(), token_T, "amax")
    return hidden_TD[last_S].to(_wide(hidden_TD))


def eos_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Takes the last token of each text, which is its end-of-sequence token."""
    return hidden_TD[batch.cu_seqlens[1:].long() - 1].to(_wide(hidden_TD))


def bos_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Takes the first token of each text."""
    return hidden_TD[batch.cu_seqlens[:-1].long()].to(_wide(hidden_TD))


POOLINGS: dict[str, Callable[[torch.Tensor, PackedBatch], torch.Tensor]] = {
    "mean": mean_pool,
    "weighted_mean": weighted_mean_pool,
    "last": last_pool,
    "eos": eos_pool,
    "bos": bos_pool,
}
"""Maps a name in recipes to its pooling of hidden states `[T, D]` and batch into `[S, D]`, fp32 or wider."""

OF_ONE_TOKEN = ("last", "eos", "bos")
"""Poolings that take a single token. For `last` it is one of the text."""


def _wide(hidden_TD: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden_TD.dtype, torch.float32)


def _weighted(hidden_TD: torch.Tensor, batch: PackedBatch, weight_T: torch.Tensor) -> torch.Tensor:
    """Returns Σ weight · hidden / Σ weight of each text. A text without weight gets zeros."""
    segment_T = batch.segment_ids()
    sum_SD = weight_T.new_zeros(batch.n_texts, hidden_TD.shape[1])
    sum_SD = sum_SD.index_add(0, segment_T, hidden_TD.to(weight_T.dtype) * weight_T[:, None])
    total_S = weight_T.new_zeros(batch.n_texts).index_add(0, segment_T, weight_T)
    return sum_SD / torch.where(total_S > 0, total_S, 1.0)[:, None]
