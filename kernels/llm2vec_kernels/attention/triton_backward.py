"""Backward kernels of packed non-causal attention: dq by tiles of queries, dk and dv by tiles of keys.

This is FlashAttention-2 (Dao, 2023, arXiv 2307.08691, algorithm 2), split into two kernels. There, programs
add to dq with atomics. Here one program sums each gradient in one order, so the bits are the same every
time. The price is that both kernels recompute the weights.

With weights P = exp(S - lse), dropout mask Z (0 or 1/(1-p)) and slope s of the softcap:

    dv = (P∘Z)ᵀ do        dS = P ∘ (do vᵀ ∘ Z - delta) ∘ s,  delta = rowsum(do ∘ out)
    dq = scale · dS k     dk = scale · dSᵀ q

Shape legend: T tokens of all texts, Hq query heads, Hk key/value heads, M queries and N keys of a tile,
R rows and C columns of a tile whichever of both they are, D head dim (padded to a power of two).
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
    sees_others,
    store_tile,
)


@triton.jit
def weights_and_dscores(
    raw_RC,
    dweight_RC,
    lse,
    delta,
    seen_RC,
    scale,
    softcap,
    dropout_p,
    seed,
    head,
    query,
    key,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Recomputes a tile's weights P. Returns P∘Z and dS = P ∘ (do vᵀ ∘ Z - delta) ∘ s (see the module)."""
    score_RC, slope_RC = log2_scores(raw_RC, scale, softcap, HAS_SOFTCAP)
    weight_RC = tl.exp2(score_RC - lse)
    if not WHOLE:
        weight_RC = tl.where(seen_RC, weight_RC, 0.0)
    used_RC = weight_RC
    if HAS_DROPOUT:
        factor_RC = tl.where(kept(seed, head, query, key, dropout_p), 1.0 / (1.0 - dropout_p), 0.0)
        used_RC = weight_RC * factor_RC
        dweight_RC = dweight_RC * factor_RC
    return used_RC, weight_RC * (dweight_RC - delta) * slope_RC


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["seed_ptr"])
def dq_kernel(
    q_ptr,  # [T, Hq, D], any strides over T and Hq
    k_ptr,  # [T, Hk, D], likewise
    v_ptr,  # [T, Hk, D], likewise
    out_ptr,  # [T, Hq, D] contiguous, as are do and dq
    dout_ptr,
    dq_ptr,
    lse_ptr,  # [Hq, T] fp32, from the forward kernel
    delta_ptr,  # [Hq, T] fp32, written here, read by the dk/dv kernel
    first_ptr,  # [T] int32
    past_ptr,  # [T] int32
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    n_tokens, scale, softcap, dropout_p,
    seed_ptr,  # int64 scalar; None without dropout
    D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    out_stride_t = tl.num_programs(1) * D
    query0 = tl.program_id(0) * BLOCK_M
    query_M = query0 + tl.arange(0, BLOCK_M)
    q_base = q_ptr + head.to(tl.int64) * q_stride_h
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_stride_h
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_stride_h
    own = head.to(tl.int64) * D
    of_head = head.to(tl.int64) * n_tokens

    first_M, past_M = load_interval(first_ptr, past_ptr, query_M, n_tokens)
    begin, n_tiles, n_before, n_whole = column_tiles(first_ptr, past_ptr, query0, n_tokens, BLOCK_M, BLOCK_N)
    q_MD = load_tile(q_base, query0, q_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, True)
    dout_MD = load_tile(dout_ptr + own, query0, out_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, True)
    out_MD = load_tile(out_ptr + own, query0, out_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, True)
    # out is after dropout, so do · out is the sum over keys of P ∘ (do vᵀ ∘ Z).
    delta_M = tl.sum(out_MD.to(tl.float32) * dout_MD.to(tl.float32), 1)
    tl.store(delta_ptr + of_head + query_M, delta_M, mask=query_M < n_tokens)
    lse_M = tl.load(lse_ptr + of_head + query_M, mask=query_M < n_tokens, other=0.0)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Compiled twice: first the tiles at the rim, with mask and bounds checks, then the whole tiles without.
    for WHOLE in tl.static_range(2):
        n_steps = n_whole if WHOLE else n_tiles - n_whole
        for step in range(0, n_steps):
            key0 = column_of_step(step, begin, n_before, n_whole, BLOCK_N, WHOLE)
            key_N = key0 + tl.arange(0, BLOCK_N)
            k_ND = load_tile(k_base, key0, k_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, not WHOLE)
            v_ND = load_tile(v_base, key0, v_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, not WHOLE)
            _, dscore_MN = weights_and_dscores(
                dot(q_MD, tl.trans(k_ND), None),
                dot(dout_MD, tl.trans(v_ND), None),
                lse_M[:, None], delta_M[:, None], sees(first_M, past_M, key_N),
                scale, softcap, dropout_p, seed, head, query_M[:, None], key_N[None, :],
                HAS_SOFTCAP, HAS_DROPOUT, WHOLE,
            )  # fmt: skip
            dq_MD = dot(dscore_MN.to(k_ND.dtype), k_ND, dq_MD)

    dq_MD = tl.where(sees_others(first_M, past_M)[:, None], dq_MD * scale, 0.0)
    store_tile(dq_ptr + own, dq_MD, query0, out_stride_t, n_tokens, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["seed_ptr"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr,  # as in dq_kernel
    dk_ptr,  # [T, Hk, D] contiguous, as is dv
    dv_ptr,
    lse_ptr, delta_ptr, first_ptr, past_ptr,  # as in dq_kernel
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    n_tokens, scale, softcap, dropout_p,
    seed_ptr,  # int64 scalar; None without dropout
    D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dout_stride_t = tl.num_programs(1) * GROUP * D
    key0 = tl.program_id(0) * BLOCK_N
    key_N = key0 + tl.arange(0, BLOCK_N)
    k_base = k_ptr + kv_head.to(tl.int64) * k_stride_h
    v_base = v_ptr + kv_head.to(tl.int64) * v_stride_h

    first_N, past_N = load_interval(first_ptr, past_ptr, key_N, n_tokens)
    begin, n_tiles, n_before, n_whole = column_tiles(first_ptr, past_ptr, key0, n_tokens, BLOCK_N, BLOCK_M)
    k_ND = load_tile(k_base, key0, k_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, True)
    v_ND = load_tile(v_base, key0, v_stride_t, n_tokens, BLOCK_N, D, BLOCK_D, True)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(0, GROUP):  # query heads of this key/value head, in one order: no atomics
        head = kv_head * GROUP + member
        q_base = q_ptr + head.to(tl.int64) * q_stride_h
        dout_base = dout_ptr + head.to(tl.int64) * D
        of_head = head.to(tl.int64) * n_tokens
        for WHOLE in tl.static_range(2):
            n_steps = n_whole if WHOLE else n_tiles - n_whole
            for step in range(0, n_steps):
                query0 = column_of_step(step, begin, n_before, n_whole, BLOCK_M, WHOLE)
                query_M = query0 + tl.arange(0, BLOCK_M)
                q_MD = load_tile(q_base, query0, q_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, not WHOLE)
                dout_MD = load_tile(
                    dout_base, query0, dout_stride_t, n_tokens, BLOCK_M, D, BLOCK_D, not WHOLE
                )
                exists_M = query_M < n_tokens
                lse_M = tl.load(lse_ptr + of_head + query_M, mask=exists_M, other=0.0)
                delta_M = tl.load(delta_ptr + of_head + query_M, mask=exists_M, other=0.0)
                used_NM, dscore_NM = weights_and_dscores(
                    dot(k_ND, tl.trans(q_MD), None),
                    dot(v_ND, tl.trans(dout_MD), None),
                    lse_M[None, :], delta_M[None, :], sees(first_N, past_N, query_M),
                    scale, softcap, dropout_p, seed, head, query_M[None, :], key_N[:, None],
                    HAS_SOFTCAP, HAS_DROPOUT, WHOLE,
                )  # fmt: skip
                dv_ND = dot(used_NM.to(dout_MD.dtype), dout_MD, dv_ND)
                dk_ND = dot(dscore_NM.to(q_MD.dtype), q_MD, dk_ND)

    own = kv_head.to(tl.int64) * D
    stride_t = tl.num_programs(1) * D
    dk_ND = tl.where(sees_others(first_N, past_N)[:, None], dk_ND * scale, 0.0)
    store_tile(dk_ptr + own, dk_ND, key0, stride_t, n_tokens, BLOCK_N, D, BLOCK_D)
    store_tile(dv_ptr + own, dv_ND, key0, stride_t, n_tokens, BLOCK_N, D, BLOCK_D)
