"""The specification of packed attention, in plain PyTorch: slow, obvious, exact in the dtype of its inputs.

Shape legend: T tokens of all texts together, S texts, Hq query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import torch

from llm2vec_kernels.attention.options import AttentionOptions


def segment_ids(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Returns the text of each token of the packed stream, `[T]`, from `cu_seqlens [S+1]`."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def visible_pairs(
    cu_seqlens: torch.Tensor, *, window: int | None = None, causal: bool = False
) -> torch.Tensor:
    """Returns `[T, T]` bool: query i sees key j in the same text, within reach, and not ahead if causal."""
    segment_T = segment_ids(cu_seqlens)
    position_T = torch.arange(len(segment_T), device=cu_seqlens.device)
    distance_TT = position_T[:, None] - position_T[None, :]
    visible_TT = segment_T[:, None] == segment_T[None, :]
    if window is not None:
        visible_TT = visible_TT & (distance_TT.abs() <= window)
    if causal:
        visible_TT = visible_TT & (distance_TT >= 0)
    return visible_TT


def attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    options: AttentionOptions,
    kept_HTT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns softmax(softcap(scale · q kᵀ) + mask) v over the whole T×T square, `[T, Hq, D]`.

    Query heads share key/value heads in order (GQA, arXiv 2305.13245). `kept_HTT` `[Hq, T, T]` bool says
    which weights dropout keeps. None: it keeps all, whatever `dropout_p` is.
    """
    group = q_THD.shape[1] // k_THD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(group, dim=1) for x in (k_THD, v_THD))
    score_HTT = torch.einsum("ihd,jhd->hij", q_THD, k_THD) * options.softmax_scale
    if options.softcap is not None:
        score_HTT = options.softcap * torch.tanh(score_HTT / options.softcap)
    visible_TT = visible_pairs(cu_seqlens, window=options.window, causal=options.causal)
    score_HTT = score_HTT.masked_fill(~visible_TT, float("-inf"))
    weight_HTT = score_HTT.softmax(-1)
    if kept_HTT is not None:
        weight_HTT = weight_HTT * kept_HTT / (1 - options.dropout_p)
    return torch.einsum("hij,jhd->ihd", weight_HTT, v_THD)
