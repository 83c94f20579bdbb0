"""Packed CPU attention against the dense reference in double precision, gradients too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm2vec_kernels.attention import AttentionOptions, attention, choose_attention_backend, reference
from llm2vec_kernels.attention.cpu import equal_length_runs

lengths_of_texts = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def packed(lengths: list[int], heads: int, kv_heads: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return q, k, v, cu_seqlens


@settings(max_examples=60)
@given(
    lengths=lengths_of_texts,
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 0, 1, 3, 20]),
    softcap=st.sampled_from([None, 2.0]),
    causal=st.booleans(),
)
def test_equals_the_reference(
    lengths: list[int], kv_heads: int, window: int | None, softcap: float | None, causal: bool
) -> None:
    *qkv, cu_seqlens = packed(lengths, 4, kv_heads)
    options = AttentionOptions(0.3, window, softcap, causal=causal)
    results = []
    for function in (attention, reference.attention):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves, cu_seqlens, options=options)  # type: ignore[operator]
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        (out * weight).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_no_text_sees_another() -> None:
    q, k, v, cu_seqlens = packed([3, 5, 5], 4, 2)
    before = attention(q, k, v, cu_seqlens, options=AttentionOptions(0.3))
    k[3:8] += 1.0
    v[3:8] += 1.0
    after = attention(q, k, v, cu_seqlens, options=AttentionOptions(0.3))
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)
    torch.testing.assert_close(before[8:], after[8:], rtol=0, atol=0)
    assert (before[3:8] - after[3:8]).abs().min() > 1e-3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_the_asked_share_and_keeps_the_mean(softcap: float | None) -> None:
    torch.manual_seed(0)
    total = 64
    q, k = torch.zeros(total, 8, 8), torch.zeros(total, 8, 8)
    v = torch.ones(total, 8, 8)
    cu_seqlens = torch.tensor([0, total]).int()
    options = AttentionOptions(1.0, softcap=softcap, dropout_p=0.3)
    out = attention(q, k, v, cu_seqlens, options=options)
    # Each output is the mean of 64 draws of 0 or 1/0.7, so its variance is 0.3 / 0.7 / 64.
    assert abs(out[:, :, 0].mean() - 1) < 0.02
    assert 0.6 < out[:, :, 0].var() / (0.3 / 0.7 / total) < 1.6


def test_empty_stream() -> None:
    q = torch.zeros(0, 2, 4)
    out = attention(q, q, q, torch.tensor([0, 0]).int(), options=AttentionOptions(1.0))
    assert out.shape == (0, 2, 4)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'flash'.*auto, triton, flash_attn, varlen, torch"):
        choose_attention_backend("flash")


def test_runs_follow_a_change_of_the_boundaries() -> None:
    bounds = torch.tensor([0, 3, 6, 10], dtype=torch.int32)
    assert equal_length_runs(bounds) == equal_length_runs(bounds) == [(2, 3), (1, 4)]
    bounds[2] = 5
    assert equal_length_runs(bounds) == [(1, 3), (1, 2), (1, 5)]
    with torch.inference_mode():
        assert equal_length_runs(torch.tensor([0, 2, 4])) == [(2, 2)]
