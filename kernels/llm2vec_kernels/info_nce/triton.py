"""The two passes over a tile of scores after its matrix product, in Triton.

The first pass reads the products and gives each row's log-sum-exp. The second reads them and writes the
coefficients of the gradients, in the dtype of the next product. Each pass scales scores and leaves documents
out by itself, so the tile need not be written in between.

Shape legend: N documents, B queries of one tile, R rows and C columns of what a program holds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llm2vec_kernels.info_nce.tiles import Block, ScoreStatistics

PROGRAM_ELEMENTS = 4096
"""Scores that a program holds at a time."""
WARPS = 8


@triton.jit
def load_scores(
    score_ptr,
    row_R,
    column_C,
    n_rows,
    n_columns,
    scale,
    positive_R,
    query_id_ptr,
    document_id_ptr,
    limit_ptr,
    HAS_SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
):
    """Loads scores `[R, C]`, scaled. A document that does not count has −inf."""
    row_exists, column_exists = row_R < n_rows, column_C < n_columns
    exists = row_exists[:, None] & column_exists[None, :]
    offset = row_R.to(tl.int64)[:, None] * n_columns + column_C[None, :]
    score_RC = tl.load(score_ptr + offset, mask=exists, other=0.0)
    if HAS_SCALE:
        score_RC *= scale
    counts = exists
    if HAS_IDS:
        query_id_R = tl.load(query_id_ptr + row_R, mask=row_exists, other=0)
        document_id_C = tl.load(document_id_ptr + column_C, mask=column_exists, other=0)
        counts &= query_id_R[:, None] != document_id_C[None, :]
    if HAS_LIMITS:
        limit_R = tl.load(limit_ptr + row_R, mask=row_exists, other=0.0)
        counts &= (score_RC > limit_R[:, None]) == 0  # a NaN counts
    counts |= exists & (column_C[None, :] == positive_R[:, None])
    return tl.where(counts, score_RC, float("-inf"))


@triton.jit(do_not_specialize=["n_rows"])
def statistics_kernel(
    score_ptr,  # [B, N]
    positive_ptr,  # [B] int64, −1: not here
    query_id_ptr,  # [B] int64
    document_id_ptr,  # [N] int64
    limit_ptr,  # [B]
    lse_ptr,  # [B]
    positive_score_ptr,  # [B]
    best_negative_ptr,  # [B]
    n_rows,
    n_columns,
    scale,
    WIDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    positive_R = tl.load(positive_ptr + row_R, mask=row_R < n_rows, other=-1)
    total_R = tl.zeros([ROWS], WIDE)
    peak_R = tl.full([ROWS], float("-inf"), WIDE)
    negative_R = tl.full([ROWS], float("-inf"), WIDE)
    own_R = tl.full([ROWS], float("-inf"), WIDE)
    # Online softmax (arXiv 1805.02867): the total is kept relative to the largest score so far.
    for column0 in range(0, n_columns, COLUMNS):
        column_C = column0 + tl.arange(0, COLUMNS)
        score_RC = load_scores(
            score_ptr, row_R, column_C, n_rows, n_columns, scale, positive_R,
            query_id_ptr, document_id_ptr, limit_ptr, HAS_SCALE, HAS_IDS, HAS_LIMITS,
        )  # fmt: skip
        is_positive = column_C[None, :] == positive_R[:, None]
        own_R = tl.maximum(own_R, tl.max(tl.where(is_positive, score_RC, float("-inf")), 1))
        negative_R = tl.maximum(negative_R, tl.max(tl.where(is_positive, float("-inf"), score_RC), 1))
        new_peak_R = tl.maximum(negative_R, own_R)
        shift_R = tl.where(new_peak_R == float("-inf"), 0.0, new_peak_R)  # −inf − (−inf) would be NaN
        total_R = total_R * tl.exp(peak_R - shift_R) + tl.sum(tl.exp(score_RC - shift_R[:, None]), 1)
        peak_R = new_peak_R
    shift_R = tl.where(peak_R == float("-inf"), 0.0, peak_R)
    exists = row_R < n_rows
    tl.store(lse_ptr + row_R, shift_R + tl.log(total_R), mask=exists)
    tl.store(positive_score_ptr + row_R, own_R, mask=exists)
    # A maximum ignores NaN, a sum keeps it. So a NaN in a score reaches this statistic too.
    negative_R = tl.where(total_R == total_R, negative_R, total_R)
    tl.store(best_negative_ptr + row_R, negative_R, mask=exists)


@triton.jit(do_not_specialize=["n_rows"])
def coefficients_kernel(
    score_ptr,  # [B, N]
    positive_ptr,  # [B] int64, −1: not here
    query_id_ptr,  # [B] int64
    document_id_ptr,  # [N] int64
    limit_ptr,  # [B]
    lse_ptr,  # [B]
    row_weight_ptr,  # [B]
    out_ptr,  # [B, N], may be score_ptr
    n_rows,
    n_columns,
    scale,
    factor,
    HAS_SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_exists = row_R < n_rows
    positive_R = tl.load(positive_ptr + row_R, mask=row_exists, other=-1)
    score_RC = load_scores(
        score_ptr, row_R, column_C, n_rows, n_columns, scale, positive_R,
        query_id_ptr, document_id_ptr, limit_ptr, HAS_SCALE, HAS_IDS, HAS_LIMITS,
    )  # fmt: skip
    lse_R = tl.load(lse_ptr + row_R, mask=row_exists, other=0.0)
    lse_R = tl.where(lse_R == float("-inf"), 0.0, lse_R)
    share_RC = tl.exp(score_RC - lse_R[:, None])
    share_RC = tl.where(column_C[None, :] == positive_R[:, None], share_RC - 1.0, share_RC)
    if HAS_WEIGHTS:
        share_RC *= (tl.load(row_weight_ptr + row_R, mask=row_exists, other=0.0) * factor)[:, None]
    else:
        share_RC *= factor
    exists = row_exists[:, None] & (column_C < n_columns)[None, :]
    offset = row_R.to(tl.int64)[:, None] * n_columns + column_C[None, :]
    tl.store(out_ptr + offset, share_RC.to(out_ptr.dtype.element_ty), mask=exists)


class TritonEpilogue:
    """An `Epilogue` on CUDA tensors. The tile stays unchanged until `coefficients`."""

    def __init__(self, block: Block, score_BN: torch.Tensor) -> None:
        self.block, self.score_BN = block, score_BN

    def statistics(self) -> ScoreStatistics:
        n_rows, n_columns = self.score_BN.shape
        out = ScoreStatistics(*self.score_BN.new_empty(3, n_rows))
        tile = program_tile(n_columns)
        if n_rows:
            with torch.cuda.device_of(self.score_BN):
                statistics_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
                    self.score_BN, *self._tensors(), *out, n_rows, n_columns, self.block.scale,
                    WIDE=tl.float64 if self.score_BN.dtype == torch.float64 else tl.float32,
                    **self._options(), **tile,
                )  # fmt: skip
        return out

    def coefficients(
        self, lse_B: torch.Tensor, factor: float, weight_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        n_rows, n_columns = self.score_BN.shape
        dtype = self.block.operand_dtype
        out_BN = (
            self.score_BN if dtype == self.score_BN.dtype else torch.empty_like(self.score_BN, dtype=dtype)
        )
        tile = program_tile(n_columns)
        lse_B, row_weight_B = (x.contiguous() for x in (lse_B, lse_B if weight_B is None else weight_B))
        if n_rows:
            grid = (triton.cdiv(n_rows, tile["ROWS"]), triton.cdiv(n_columns, tile["COLUMNS"]))
            with torch.cuda.device_of(self.score_BN):
                coefficients_kernel[grid](
                    self.score_BN, *self._tensors(), lse_B, row_weight_B, out_BN,
                    n_rows, n_columns, self.block.scale, factor,
                    HAS_WEIGHTS=weight_B is not None, **self._options(), **tile,
                )  # fmt: skip
        return out_BN

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns the positive's column, ids and limits. A tensor that is not read replaces a missing one."""
        block, unused = self.block, self.block.positive_Q
        tensors = (block.positive_Q, block.query_id_Q, block.document_id_N, block.score_limit_Q)
        return tuple(unused if x is None else x.contiguous() for x in tensors)

    def _options(self) -> dict[str, Any]:
        return {
            "HAS_SCALE": self.block.needs_scale,
            "HAS_IDS": self.block.query_id_Q is not None,
            "HAS_LIMITS": self.block.score_limit_Q is not None,
        }


def program_tile(n_columns: int) -> dict[str, int]:
    """Returns a launch's tile: one row, or several if rows are short."""
    columns = min(PROGRAM_ELEMENTS, triton.next_power_of_2(n_columns))
    return {"ROWS": PROGRAM_ELEMENTS // columns, "COLUMNS": columns, "num_warps": WARPS}
