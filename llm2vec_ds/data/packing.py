"""Packs texts into micro-batches under a token budget, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm2vec_ds.batch import NOT_PREDICTED, PackedBatch
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.errors import UserError


def plan_micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Groups texts `0..n-1` so that each group holds at most `max_tokens` tokens.

    The longest text comes first, so neighbours have similar lengths. Attention on a CPU computes equally long
    neighbours at once. The order is cut greedily, which wastes less than one text per group.

    Raises:
        UserError: a single text is longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > max_tokens:
        raise UserError(
            f"a text of {lengths.max()} tokens is longer than micro_batch_tokens={max_tokens}: raise it"
        )
    groups: list[list[int]] = []
    filled = max_tokens
    for index in np.argsort(-lengths, kind="stable"):
        if filled + lengths[index] > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(int(index))
        filled += lengths[index]
    return [np.asarray(group) for group in groups]


def pack(texts: Sequence[TokenizedText], labels: Sequence[np.ndarray] | None = None) -> PackedBatch:
    """Packs all texts into one stream, in order.

    Args:
        labels: for MNTP, one array per text; −100 is not predicted.
    """
    lengths = np.asarray([len(text) for text in texts], dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    pool_start = np.repeat([text.pool_start for text in texts], lengths)
    pool_end = np.repeat([text.pool_end for text in texts], lengths)
    pool_mask = (position_ids >= pool_start) & (position_ids < pool_end)
    input_ids = np.concatenate([np.asarray(text.input_ids, dtype=np.int64) for text in texts])
    label_T = None if labels is None else np.concatenate(labels).astype(np.int64)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        pool_mask=torch.from_numpy(pool_mask),
        labels=None if label_T is None else torch.from_numpy(label_T),
        predicted=None if label_T is None else torch.from_numpy(np.flatnonzero(label_T != NOT_PREDICTED)),
    )
