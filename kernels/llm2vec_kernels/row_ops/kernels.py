"""RMSNorm, gated units, rotary embedding and dropout in Triton. Inputs are read once, results written once.

Arithmetic is fp32 (fp64 for fp64: WIDE). There are no atomics, so backward gives the same bits every time.

Shape legend: T rows in all, D width, R rows and D (padded to a power of two) of a tile, H heads, E head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm2vec_kernels.attention.tile_ops import PHILOX_ROUNDS, load_tile, store_tile


@triton.jit
def load_factor(weight_ptr, dim_D, D: tl.constexpr, WIDE: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Loads the factor of RMSNorm, `[D]`."""
    weight_D = tl.load(weight_ptr + dim_D, mask=dim_D < D, other=0.0).to(WIDE)
    return weight_D + 1.0 if PLUS_ONE else weight_D


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    out_ptr,  # [T, D]
    inverse_ptr,  # [T] WIDE
    n_rows,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    row0 = tl.program_id(0) * ROWS
    row_R, dim_D = row0 + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    x_RD = load_tile(x_ptr, row0, D, n_rows, ROWS, D, BLOCK_D, True)
    wide_RD = x_RD.to(WIDE)
    inverse_R = tl.rsqrt(tl.sum(wide_RD * wide_RD, 1) / D + EPS)
    normal_RD = wide_RD * inverse_R[:, None]
    if not PLUS_ONE:  # transformers' Llama rounds here, its Gemma does not
        normal_RD = normal_RD.to(x_RD.dtype).to(WIDE)
    factor_D = load_factor(weight_ptr, dim_D, D, WIDE, PLUS_ONE)
    store_tile(out_ptr, normal_RD * factor_D[None, :], row0, D, n_rows, ROWS, D, BLOCK_D)
    tl.store(inverse_ptr + row_R, inverse_R, mask=row_R < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def rms_norm_backward_kernel(
    d_out_ptr,  # [T, D]
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    inverse_ptr,  # [T] WIDE
    d_x_ptr,  # [T, D]
    sums_ptr,  # [programs, D] WIDE, a part of the weight's gradient each
    n_rows,
    n_tiles,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    WEIGHT_IS_FROZEN: tl.constexpr,
):
    dim_D = tl.arange(0, BLOCK_D)
    factor_D = load_factor(weight_ptr, dim_D, D, WIDE, PLUS_ONE)
    sum_D = tl.zeros([BLOCK_D], WIDE)
    # A program takes every num_programs-th tile. Its sum of the weight's gradient has one fixed order.
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row0 = tile * ROWS
        row_R = row0 + tl.arange(0, ROWS)
        d_out_RD = load_tile(d_out_ptr, row0, D, n_rows, ROWS, D, BLOCK_D, True).to(WIDE)
        x_RD = load_tile(x_ptr, row0, D, n_rows, ROWS, D, BLOCK_D, True).to(WIDE)
        inverse_R = tl.load(inverse_ptr + row_R, mask=row_R < n_rows, other=0.0)
        normal_RD = x_RD * inverse_R[:, None]
        if not WEIGHT_IS_FROZEN:
            sum_D += tl.sum(d_out_RD * normal_RD, 0)
        g_RD = d_out_RD * factor_D[None, :]
        mean_R = tl.sum(g_RD * normal_RD, 1) / D
        d_x_RD = (g_RD - normal_RD * mean_R[:, None]) * inverse_R[:, None]
        store_tile(d_x_ptr, d_x_RD, row0, D, n_rows, ROWS, D, BLOCK_D)
    if not WEIGHT_IS_FROZEN:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + dim_D, sum_D, mask=dim_D < D)


GELU_FACTOR = tl.constexpr(1.5957691216057308)
"""2·√(2/π)."""
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def activation(x, GELU: tl.constexpr):
    """Returns x · σ(z) and its derivative σ(z) + x · σ(z) · σ(−z) · z′.

    SiLU has z = x. GELU by tanh has (1 + tanh u) / 2 = σ(2u), so z = 2·√(2/π) · (x + 0.044715 x³).
    """
    if GELU:
        square = x * x
        z = x * (1.0 + GELU_CUBE * square) * GELU_FACTOR
        z_slope = (1.0 + 3.0 * GELU_CUBE * square) * GELU_FACTOR
    else:
        z, z_slope = x, 1.0
    share = 1.0 / (1.0 + tl.exp(-z))
    rest = 1.0 / (1.0 + tl.exp(z))  # σ(−z). 1 − σ(z) would lose its digits where x and z′ are large
    return x * share, share + x * share * rest * z_slope


@triton.jit  # n_elements is specialised: 16 bytes are loaded at a time only if 16 is known to divide it
def gated_unit_kernel(
    gate_ptr, up_ptr, out_ptr, n_elements, GELU: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = element < n_elements
    gate = tl.load(gate_ptr + element, mask=exists, other=0.0)
    up = tl.load(up_ptr + element, mask=exists, other=0.0).to(WIDE)
    activated, _ = activation(gate.to(WIDE), GELU)
    out = activated.to(gate.dtype).to(WIDE) * up
    tl.store(out_ptr + element, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def gated_unit_backward_kernel(
    d_out_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    n_elements,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = element < n_elements
    d_out = tl.load(d_out_ptr + element, mask=exists, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + element, mask=exists, other=0.0).to(WIDE)
    up = tl.load(up_ptr + element, mask=exists, other=0.0).to(WIDE)
    activated, slope = activation(gate, GELU)
    tl.store(d_up_ptr + element, (d_out * activated).to(d_up_ptr.dtype.element_ty), mask=exists)
    tl.store(d_gate_ptr + element, (d_out * up * slope).to(d_gate_ptr.dtype.element_ty), mask=exists)


@triton.jit
def rotate_tile(
    x_ptr,  # [T, HEADS, E], any strides over T and HEADS
    cos_ptr,  # [T, E]
    sin_ptr,  # [T, E]
    out_ptr,  # [T, HEADS, E] contiguous
    stride_t,
    stride_h,
    tile,
    n_rows,  # T · HEADS
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # E / 2
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    row_R = tile * ROWS + tl.arange(0, ROWS)
    token_R, head_R = (row_R // HEADS).to(tl.int64), row_R % HEADS
    dim_E = tl.arange(0, BLOCK)
    exists = (row_R < n_rows)[:, None] & (dim_E < HALF)[None, :]
    x_a = x_ptr + (token_R * stride_t + head_R * stride_h)[:, None] + dim_E[None, :]
    out_a = out_ptr + (row_R.to(tl.int64) * (2 * HALF))[:, None] + dim_E[None, :]
    angle_a = (token_R * (2 * HALF))[:, None] + dim_E[None, :]

    a = tl.load(x_a, mask=exists, other=0.0).to(WIDE)
    b = tl.load(x_a + HALF, mask=exists, other=0.0).to(WIDE)
    cos_a = tl.load(cos_ptr + angle_a, mask=exists, other=0.0).to(WIDE)
    cos_b = tl.load(cos_ptr + angle_a + HALF, mask=exists, other=0.0).to(WIDE)
    sin_a = tl.load(sin_ptr + angle_a, mask=exists, other=0.0).to(WIDE)
    sin_b = tl.load(sin_ptr + angle_a + HALF, mask=exists, other=0.0).to(WIDE)
    if BACKWARD:
        turned_a, turned_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        turned_a, turned_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(out_a, turned_a.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(out_a + HALF, turned_b.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["n_tokens"])
def rotate_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    turned_q_ptr,
    turned_k_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    n_tokens,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rotates queries in the first programs and keys in the others.

    A pointer that is chosen row by row hides its alignment from the compiler, which then loads two bytes at a
    time. So each program works on one of the two.
    """
    tile = tl.program_id(0)
    n_q_tiles = tl.cdiv(n_tokens * Q_HEADS, ROWS)
    if tile < n_q_tiles:
        rotate_tile(
            q_ptr, cos_ptr, sin_ptr, turned_q_ptr, q_stride_t, q_stride_h, tile, n_tokens * Q_HEADS,
            Q_HEADS, HALF, ROWS, BLOCK, WIDE, BACKWARD,
        )  # fmt: skip
    else:
        rotate_tile(
            k_ptr, cos_ptr, sin_ptr, turned_k_ptr, k_stride_t, k_stride_h, tile - n_q_tiles,
            n_tokens * K_HEADS, K_HEADS, HALF, ROWS, BLOCK, WIDE, BACKWARD,
        )  # fmt: skip


@triton.jit
def drop_quarter(x_ptr, out_ptr, word, p, element, n_elements, ADD: tl.constexpr, WIDE: tl.constexpr):
    exists = element < n_elements
    stays = tl.uint_to_uniform_float(word) >= p
    out = tl.where(stays, tl.load(x_ptr + element, mask=exists, other=0.0).to(WIDE), 0.0)
    if ADD:
        out += tl.load(out_ptr + element, mask=exists, other=0.0).to(WIDE)
    tl.store(out_ptr + element, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["seed_ptr"])
def drop_kernel(
    x_ptr,
    out_ptr,
    p,
    seed_ptr,
    n_elements,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Computes out = x or out += x for elements that are not dropped.

    One call of Philox makes four random words, so a program works on four blocks. An element's
    random number depends on seed, BLOCK and the element's own number alone.
    """
    lane = tl.arange(0, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    counter = program * BLOCK + lane
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, zero, zero, n_rounds=PHILOX_ROUNDS)
    first = program * (4 * BLOCK) + lane
    drop_quarter(x_ptr, out_ptr, a, p, first, n_elements, ADD, WIDE)
    drop_quarter(x_ptr, out_ptr, b, p, first + BLOCK, n_elements, ADD, WIDE)
    drop_quarter(x_ptr, out_ptr, c, p, first + 2 * BLOCK, n_elements, ADD, WIDE)
    drop_quarter(x_ptr, out_ptr, d, p, first + 3 * BLOCK, n_elements, ADD, WIDE)
