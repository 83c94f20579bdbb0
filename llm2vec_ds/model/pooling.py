"""Token vectors of a packed stream → one vector a text, without a loop over texts."""

from __future__ import annotations

import torch

from llm2vec_ds.batch import PackedBatch


def mean_pool(hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean over the tokens in `pool_mask`, `[S, D]` fp32 (a text without any gets zeros)."""
    weight_T = batch.pool_mask.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    segment_T = batch.segment_ids()
    sum_SD = weight_T.new_zeros(batch.n_texts, hidden_TD.shape[1])
    sum_SD = sum_SD.index_add(0, segment_T, hidden_TD.to(weight_T.dtype) * weight_T[:, None])
    count_S = weight_T.new_zeros(batch.n_texts).index_add(0, segment_T, weight_T)
    return sum_SD / count_S.clamp(min=1)[:, None]
