"""Packed attention with stock PyTorch: runs of equally long texts become batched SDPA calls.

This works on any device and in any float dtype. CPUs use it. Texts sorted by length make long runs. A run is
a view of the packed stream, so nothing is copied, padded or masked.

Shape legend: T tokens of all texts, N texts in a run, L their common length, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm2vec_kernels.attention.cpu import cpu_attention, equal_length_runs, window_mask
from llm2vec_kernels.attention.options import AttentionOptions


def torch_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Computes attention inside each text of the packed stream, `[T, Hq, D]`; see `api.attention`."""
    scale, window, causal = options.softmax_scale, options.window, options.causal
    if options.softcap is None and options.dropout_p == 0 and q_THD.device.type == "cpu":
        return cpu_attention(q_THD, k_THD, v_THD, cu_seqlens, scale, window, causal)[0]
    runs = list(equal_length_runs(cu_seqlens))
    # Split, not sliced: backward of a slice writes a whole tensor of zeros for each run.
    parts = (x.split([n_texts * length for n_texts, length in runs]) for x in (q_THD, k_THD, v_THD))
    outputs = []
    for (n_texts, length), *part in zip(runs, *parts, strict=True):
        q_NHLD, k_NHLD, v_NHLD = (x.unflatten(0, (n_texts, length)).transpose(1, 2) for x in part)
        mask_LL = window_mask(length, window, causal, q_THD.device)
        if options.softcap is None:
            out_NHLD = F.scaled_dot_product_attention(
                q_NHLD,
                k_NHLD,
                v_NHLD,
                attn_mask=mask_LL,
                dropout_p=options.dropout_p,
                is_causal=causal and mask_LL is None,
                scale=scale,
                enable_gqa=q_THD.shape[1] != k_THD.shape[1],
            )
        else:
            out_NHLD = _softcapped(q_NHLD, k_NHLD, v_NHLD, mask_LL, options.softcap, options)
        outputs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros_like(q_THD)


def _softcapped(
    q_NHLD: torch.Tensor,
    k_NHLD: torch.Tensor,
    v_NHLD: torch.Tensor,
    mask_LL: torch.Tensor | None,
    softcap: float,
    options: AttentionOptions,
) -> torch.Tensor:
    """Computes attention step by step, because SDPA has no softcap. Scores and softmax are at least fp32."""
    group = q_NHLD.shape[1] // k_NHLD.shape[1]
    k_NHLD, v_NHLD = (x.repeat_interleave(group, dim=1) for x in (k_NHLD, v_NHLD))
    wide = torch.promote_types(q_NHLD.dtype, torch.float32)
    score_NHLL = (q_NHLD.to(wide) @ k_NHLD.to(wide).mT) * options.softmax_scale
    score_NHLL = softcap * torch.tanh(score_NHLL / softcap)
    if mask_LL is None and options.causal:
        mask_LL = torch.ones(score_NHLL.shape[-2:], dtype=torch.bool, device=q_NHLD.device).tril()
    if mask_LL is not None:
        score_NHLL = score_NHLL.masked_fill(~mask_LL, float("-inf"))
    weight_NHLL = F.dropout(score_NHLL.softmax(-1), options.dropout_p)
    return (weight_NHLL.to(v_NHLD.dtype)) @ v_NHLD
