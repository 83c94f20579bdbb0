"""Forward kernel of packed non-causal attention: one program computes a tile of queries of one head.

It runs the online softmax (Milakov & Gimelshein, 2018, arXiv 1805.02867) as in FlashAttention-2 (Dao, 2023,
arXiv 2307.08691, algorithm 1). Its tile of the packed stream may hold many texts.

Shape legend: T tokens of all texts, Hq query heads, Hk key/value heads, M queries and N keys of a tile,
D head dim (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm2vec_kernels.attention.tile_ops import (
    column_of_step,
    column_tiles,
    dot,
    kept,
    load_interval,
    load_tile,
    log2_scores,
    sees,
    store_tile,
)


@triton.jit
def softmax_step(score_MN, peak_M, total_M):
    """Adds a tile of keys to the running softmax.

    Returns:
        weights `[M, N]` relative to the new peak, exp2(score − peak); the peak and the total with this tile;
        and the factor exp2(old peak − new peak), by which sums over earlier tiles are scaled.
    """
    new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1))
    # A row that has seen no key yet has the peak −inf, and −inf − (−inf) is NaN. With a shift of 0, its
    # weights are exp2(−inf) = 0.
    shift_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
    weight_MN = tl.exp2(score_MN - shift_M[:, None])
    fade_M = tl.exp2(peak_M - shift_M)
    return weight_MN, new_peak_M, total_M * fade_M + tl.sum(weight_MN, 1), fade_M


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["seed_ptr"])
def forward_kernel(
    q_ptr,  # [T, Hq, D], any strides over T and Hq
    k_ptr,  # [T, Hk, D], likewise
    v_ptr,  # [T, Hk, D], likewise
    out_ptr,  # [T, Hq, D] contiguous
    lse_ptr,  # [Hq, T] fp32, log-sum-exp of the scores in units of log 2
    first_ptr,  # [T] int32, first token that a token sees
    past_ptr,  # [T] int32, one past the last
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    n_tokens, scale, softcap, dropout_p,
    seed_ptr,  # int64 scalar; None without dropout
    D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key/value head
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    n_heads = tl.num_programs(1)
    query0 = tl.program_id(0) * BLOCK_M
    query_M = query0 + tl.arange(0, BLOCK_M)
    q_base = q_ptr + head.to(tl.int64) * q_stride_h
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_stride_h
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_stride_h

    first_M, past_M = load_interval(first_ptr, past_ptr, query_M, n_tokens)
    begin, n_tiles, n_before, n_whole = column_tiles(first_ptr, past_ptr, query0, n_tokens, BLOCK_M, BLOCK_N)
    q_MD = load_tile(q_base, query0, q_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, True)
    out_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)

    # Compiled twice: first the tiles at the rim, with mask and bounds checks, then the whole tiles without.
    for WHOLE in tl.static_range(2):
        n_steps = n_whole if WHOLE else n_tiles - n_whole
        for step in range(0, n_steps):
            key0 = column_of_step(step, begin, n_before, n_whole, BLOCK_N, WHOLE)
            key_N = key0 + tl.arange(0, BLOCK_N)
            k_ND = load_tile(k_base, key0, k_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, not WHOLE)
            raw_MN = dot(q_MD, tl.trans(k_ND), None)
            score_MN, _ = log2_scores(raw_MN, scale, softcap, HAS_SOFTCAP)
            if not WHOLE:
                score_MN = tl.where(sees(first_M, past_M, key_N), score_MN, float("-inf"))
            weight_MN, peak_M, total_M, fade_M = softmax_step(score_MN, peak_M, total_M)
            if HAS_DROPOUT:  # after the total: dropout acts on the weights that softmax has normalised
                kept_MN = kept(seed, head, query_M[:, None], key_N[None, :], dropout_p)
                weight_MN = tl.where(kept_MN, weight_MN, 0.0)
            v_ND = load_tile(v_base, key0, v_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, not WHOLE)
            out_MD = dot(weight_MN.to(v_ND.dtype), v_ND, out_MD * fade_M[:, None])

    kept_share = 1.0 - dropout_p if HAS_DROPOUT else 1.0
    out_MD = out_MD / (total_M * kept_share)[:, None]
    out_base = out_ptr + head.to(tl.int64) * D
    store_tile(out_base, out_MD, query0, n_heads * D, n_tokens, BLOCK_M, D, BLOCK_D)
    lse_base = lse_ptr + head.to(tl.int64) * n_tokens
    tl.store(lse_base + query_M, peak_M + tl.log2(total_M), mask=query_M < n_tokens)
