"""Packed attention on a CPU as one operation: PyTorch's fused kernel, one text length after the other.

It is one operation, not one call for each length under autograd. So autograd records no slices, and selective
activation checkpointing can keep the result.

Shape legend: T tokens of all texts, N texts in a run, L their common length, H query heads, K key/value
heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch

from llm2vec_kernels.operation import Operation

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_of_run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def equal_length_runs(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """Returns (number of texts, length) for each run of neighbouring texts of one length.

    The tensor keeps the runs until it changes, so all layers share them. A tensor made under inference mode
    has no version counter that shows a change. So it keeps none.
    """
    if cu_seqlens.is_inference():
        return _runs_of(cu_seqlens)
    known: tuple[int, list[tuple[int, int]]] | None = getattr(cu_seqlens, "llm2vec_runs", None)
    if known is None or known[0] != cu_seqlens._version:
        known = cu_seqlens._version, _runs_of(cu_seqlens)
        cu_seqlens.llm2vec_runs = known  # type: ignore[attr-defined]
    return known[1]


def _runs_of(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    lengths = filter(None, cu_seqlens.diff().tolist())
    return [(sum(1 for _ in run), length) for length, run in groupby(lengths)]


def window_mask(length: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Returns a mask `[L, L]` bool for a window that is shorter than the text. None: it hides no key."""
    if window is None or window >= length - 1:
        return None
    ones_LL = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones_LL.tril(0 if causal else window).triu(-window)


def _attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    softmax_scale: float,
    window: int | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention inside each text, without dropout or softcap; see `api.attention`.

    Returns:
        `[T, H, D]`, and the log-sum-exp of the scores `[T, H]` for backward.
    """
    if (run := _only_run(cu_seqlens, q_THD.dtype, window, causal)) is not None:
        view, mask = run
        q, k, v = view(q_THD), view(k_TKD), view(v_TKD)
        is_causal = causal and mask is None
        found = _forward(q, k, v, 0.0, is_causal, attn_mask=mask, scale=softmax_scale)
        out_THD, lse_TH = (x.transpose(1, 2).flatten(0, 1) for x in found)
        return out_THD, lse_TH
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.promote_types(q_THD.dtype, torch.float32))
    for run, mask in _runs(cu_seqlens, q_THD.dtype, window, causal):
        q, k, v, out, lse = map(run, (q_THD, k_TKD, v_TKD, out_THD, lse_TH))
        out_run, lse_run = _forward(
            q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=softmax_scale
        )
        out.copy_(out_run)
        lse.copy_(lse_run)
    return out_THD, lse_TH


def _shapes(q_THD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=lse_dtype)


def _attention_backward(
    d_out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    softmax_scale: float,
    window: int | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v, in their shapes."""
    inputs = (q_THD, k_TKD, v_TKD)
    if (run := _only_run(cu_seqlens, q_THD.dtype, window, causal)) is not None:
        view, mask = run
        tensors = map(view, (d_out_THD, *inputs, out_THD, lse_TH))
        is_causal = causal and mask is None
        found = _backward_of_run(*tensors, 0.0, is_causal, attn_mask=mask, scale=softmax_scale)
        d_q, d_k, d_v = (x.transpose(1, 2).flatten(0, 1) for x in found)
        return d_q, d_k, d_v
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    for run, mask in _runs(cu_seqlens, q_THD.dtype, window, causal):
        tensors = map(run, (d_out_THD, *inputs, out_THD, lse_TH))
        found = _backward_of_run(*tensors, 0.0, causal and mask is None, attn_mask=mask, scale=softmax_scale)
        for gradient, part in zip(gradients, found, strict=True):
            run(gradient).copy_(part)
    return gradients  # type: ignore[return-value]


def _gradient_shapes(
    d_out_THD: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in inputs[:3])
    return q, k, v


cpu_attention_backward = Operation("llm2vec::cpu_attention_backward", _attention_backward, _gradient_shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.softmax_scale, ctx.window, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, d_out_THD: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if d_out_THD is None:
        return (None,) * 7
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    gradients = cpu_attention_backward(
        d_out_THD, q, k, v, out, lse, cu_seqlens, ctx.softmax_scale, ctx.window, ctx.causal
    )
    return (*gradients, None, None, None, None)


cpu_attention = Operation("llm2vec::cpu_attention", _attention, _shapes).with_gradient(_keep, _backward)


def _only_run(
    cu_seqlens: torch.Tensor, dtype: torch.dtype, window: int | None, causal: bool
) -> tuple[Any, torch.Tensor | None] | None:
    """Returns the view and mask of the only run, whose result needs no copy. None: no run, or several."""
    runs = equal_length_runs(cu_seqlens)
    if len(runs) != 1:
        return None
    length = runs[0][1]
    return partial(_texts_of, length=length), _added_mask(length, dtype, window, causal, cu_seqlens.device)


def _runs(
    cu_seqlens: torch.Tensor, dtype: torch.dtype, window: int | None, causal: bool
) -> Iterator[tuple[Any, torch.Tensor | None]]:
    """Yields for each run of equally long texts a function `[T, …]` → view `[N, …, L, …]`, and the mask."""
    start = 0
    for n_texts, length in equal_length_runs(cu_seqlens):
        end = start + n_texts * length

        def view(x: torch.Tensor, start: int = start, end: int = end, length: int = length) -> torch.Tensor:
            return _texts_of(x[start:end], length)

        yield view, _added_mask(length, dtype, window, causal, cu_seqlens.device)
        start = end


def _texts_of(x: torch.Tensor, length: int) -> torch.Tensor:
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _added_mask(
    length: int, dtype: torch.dtype, window: int | None, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Returns `window_mask` as the kernel wants it: 0 or −∞ to add to the scores, in the dtype of q."""
    mask_LL = window_mask(length, window, causal, device)
    if mask_LL is None:
        return None
    return torch.zeros_like(mask_LL, dtype=dtype).masked_fill_(~mask_LL, float("-inf"))
