"""The parts that the three attention kernels share: loads, masks, scores and dropout of a tile.

A program owns a tile of *rows* of the packed stream. It walks over a contiguous range of *columns*. In the
forward and the dq kernel, rows are queries and columns are keys. In the dk/dv kernel it is the reverse.

The mask is one interval for each token: token i sees the tokens first[i] <= j < past[i]. The interval covers
the text, the window and the end of the stream. The window is symmetric, so j sees i exactly if i sees j. So
the same test serves the transposed tile of the dk/dv kernel.

Shape legend: T tokens of all texts, R rows and C columns of a tile, D head dim (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Philox-4x32 passes BigCrush from 7 rounds on (Salmon et al., 2011, "Parallel random numbers").
PHILOX_ROUNDS = tl.constexpr(7)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_tile(
    base,
    row0,
    stride,
    n_rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Loads `[ROWS, BLOCK_D]` from row `row0` on. Zeros beyond D and, if CHECK, from row `n_rows` on."""
    row_R, dim_D = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # The offset of the tile may exceed 32 bits. Offsets inside the tile do not.
    pointers = base + row0.to(tl.int64) * stride + (row_R[:, None] * stride + dim_D[None, :])
    if CHECK:
        return tl.load(pointers, mask=(row0 + row_R < n_rows)[:, None] & (dim_D < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(pointers, mask=(dim_D < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, tile, row0, stride, n_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the rows and columns of `tile [ROWS, BLOCK_D]` that exist, in the dtype of `base`."""
    row_R, dim_D = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + row0.to(tl.int64) * stride + (row_R[:, None] * stride + dim_D[None, :])
    mask = (row0 + row_R < n_rows)[:, None] & (dim_D < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def column_tiles(first_ptr, past_ptr, row0, n_tokens, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Finds the columns that a tile of rows has to visit.

    `first` and `past` never fall along the stream. So the first row's `first` and the last row's `past` bound
    the range. Every row sees all columns from the last row's `first` to the first row's `past`. Tiles inside
    that part are *whole*: they need no mask. They follow one another.

    Returns:
        begin: the first column; n_tiles: all tiles from there on; n_before: masked tiles before the whole
        ones; n_whole: whole tiles.
    """
    row_last = tl.minimum(row0 + ROWS, n_tokens) - 1
    begin, end = tl.load(first_ptr + row0), tl.load(past_ptr + row_last)
    whole_begin, whole_end = tl.load(first_ptr + row_last), tl.load(past_ptr + row0)
    n_tiles = tl.cdiv(end - begin, COLUMNS)
    n_before = tl.cdiv(whole_begin - begin, COLUMNS)
    n_whole = tl.maximum(whole_end - begin - n_before * COLUMNS, 0) // COLUMNS
    return begin, n_tiles, n_before, n_whole


@triton.jit
def column_of_step(step, begin, n_before, n_whole, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Returns the first column of tile `step` among the whole tiles, or among the masked ones around them."""
    tile = n_before + step if WHOLE else step + tl.where(step < n_before, 0, n_whole)
    return begin + tile * COLUMNS


@triton.jit
def load_interval(first_ptr, past_ptr, row_R, n_tokens):
    """Loads `first [R]` and `past [R]`. Rows beyond the stream get an empty interval."""
    exists_R = row_R < n_tokens
    first_R = tl.load(first_ptr + row_R, mask=exists_R, other=0)
    past_R = tl.load(past_ptr + row_R, mask=exists_R, other=0)
    return first_R, past_R


@triton.jit
def sees(first_R, past_R, column_C):
    """Returns `[R, C]` bool, the mask of all three kernels."""
    return (column_C[None, :] >= first_R[:, None]) & (column_C[None, :] < past_R[:, None])


@triton.jit
def sees_others(first_R, past_R):
    """Returns `[R]` bool: the token sees another token than itself.

    A token that sees only itself has weight 1 for any score. So dq and dk of this token are exactly 0. The
    kernels would compute do·v − delta, a difference of equal numbers that rounding can make nonzero. So they
    write 0 instead.
    """
    return past_R - first_R != 1


@triton.jit
def dot(a, b, sum):
    """Returns sum + a·b in fp32. fp32 operands are not rounded to TF32 (`ieee`)."""
    if INTERPRETED:
        # The interpreter would multiply the bits of bf16 as integers. In fp32 the products are the same.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def tanh(x):
    """Computes tanh to fp32 accuracy.

    tanh x = (1 − exp(−2x)) / (1 + exp(−2x)). Near 0 the numerator loses its digits. So |x| < 0.6 takes an odd
    polynomial. Its coefficients are a least-squares fit of tanh(x)/x over x² in Chebyshev nodes. The error is
    2.5e-9.
    """
    square = x * x
    tail = -0.05376993 + square * (0.02075749 - square * 0.00585643)
    near = x * (1.0 + square * (-0.33333284 + square * (0.13331705 + square * tail)))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0.0, -far, far))


@triton.jit
def log2_scores(raw_RC, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Turns products q·k into scores, and returns the slope of the softcap too.

    Scores are in units of log 2: exp(s) = exp2(s / log 2), so softmax takes exp2 alone. The softcap is
    c · tanh(s / c), and its slope 1 − tanh²(s / c).
    """
    if HAS_SOFTCAP:
        bend_RC = tanh(raw_RC * (scale / softcap))
        return bend_RC * (softcap * LOG2_E), 1.0 - bend_RC * bend_RC
    else:
        return raw_RC * (scale * LOG2_E), 1.0


@triton.jit
def kept(seed, head, query, key, dropout_p):
    """Returns which weights survive dropout. `query` and `key` broadcast against each other.

    The answer depends on (seed, head, query, key) alone. So all kernels draw the same mask, whatever their
    tiles.
    """
    # The counter of Philox is the coordinate itself. A flat offset could overflow.
    word, _, _, _ = tl.philox(seed, key, query, head, 0, n_rounds=PHILOX_ROUNDS)
    return tl.uint_to_uniform_float(word) >= dropout_p
