"""InfoNCE (van den Oord et al., 2018, arXiv 1807.03748, equation 4) that never holds the score matrix.

    score(q, d) = scale · q·d        loss(q) = log Σ_d exp score(q, d) − score(q, positive of q)

The sum runs over the positives of all rows and any number of hard negatives. It leaves out documents that
are false negatives by id, by score or by a guide. For cosines the caller normalises the vectors. Products
are accumulated and scores are kept in fp32 for all dtypes (fp64 for fp64).

A tile of scores is a few queries against all documents. With p = softmax of a row and e = one-hot of its
positive, all gradients follow from g_qd = p_qd − e_qd:

    ∂loss/∂q = scale · Σ_d g_qd d     ∂Σ w·loss/∂d = scale · Σ_q w_q g_qd q     ∂loss/∂scale = q · Σ_d g_qd d

`block_log_sum_exp`, `merge_statistics` and `block_gradients` do the same for documents that come in blocks,
as in a ring over ranks. The symmetric loss (CLIP) is a second call with roles swapped:
`info_nce(document_ND[positive_Q], query_QD, torch.arange(Q), query_id_Q=id_Q, document_id_N=id_Q, …)`. Its
ids are those of the positives, so a query with the same positive is not a negative.

Shape legend: Q queries, N documents, D width, B queries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from llm2vec_kernels.devices import runs_triton
from llm2vec_kernels.info_nce.epilogue import Epilogue, TorchEpilogue
from llm2vec_kernels.info_nce.tiles import (
    HELD_ELEMENTS,
    Block,
    BlockStatistics,
    Guide,
    Precision,
    add_product,
    computed_in,
    document_chunks,
    documents_of_a_tile,
    product,
    round_operand,
    score_tiles,
    slices,
)

TILE_MIB = 64


class InfoNce(NamedTuple):
    """`loss_Q` fp32, differentiable. `hit_Q` bool: the positive beats every negative. `lse_Q` fp32.
    `guided_Q` fp32: how many documents the guide leaves out beyond those that ids leave out."""

    loss_Q: torch.Tensor
    hit_Q: torch.Tensor
    lse_Q: torch.Tensor
    guided_Q: torch.Tensor


class BlockGradients(NamedTuple):
    """One block's share of the gradients of Σ_q weight · (lse − positive score), in fp32."""

    d_query_QD: torch.Tensor
    d_document_ND: torch.Tensor
    d_scale: torch.Tensor


def block_log_sum_exp(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    positive_Q: torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
    tile_mib: float = TILE_MIB,
    precision: Precision = "fp32",
) -> BlockStatistics:
    """Returns log-sum-exp, positive's score and best negative of each query over one block, without gradient.

    Args:
        query_QD: fp16, bf16, fp32 or fp64; document_ND: `[N, D]` of the same dtype.
        scale: the inverse temperature.
        positive_Q: int64, the row of each query's positive in this block; −1 if it is not in this block.
        query_id_Q: int64, the id of each query's positive document. With `document_id_N`, a document of
            equal id is a false negative and left out, except at the positive's own row.
        score_limit_Q: a document other than the positive is left out if its scaled score is above this.
        guide: another model's vectors of the same texts. Its products are in the dtype of its vectors.
        hardness: a negative counts exp(hardness · q·d) times in the sum. The gradient takes this factor as a
            constant (cf. Robinson et al., 2021, arXiv 2010.04592).
        tile_mib: size of the score tile in MiB. It holds at least 64 rows.
        precision: the format that products of fp32 vectors round operands to. Results stay fp32. `bf16` keeps
            8 significant bits, and `tf32` 11. Scores of vectors of length 1 are off by at most 2⁻⁷ · scale in
            `bf16`, and mostly by far less.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    others = (positive_Q, query_id_Q, document_id_N, score_limit_Q)
    block = _block(query_QD, document_ND, scale, others, guide, hardness, precision)
    with computed_in(precision):
        return _statistics(block, tile_mib)


def merge_statistics(a: BlockStatistics, b: BlockStatistics) -> BlockStatistics:
    """Joins the statistics of two blocks, as exactly as one pass over both."""
    return BlockStatistics(
        torch.logaddexp(a.lse_Q, b.lse_Q),
        torch.maximum(a.positive_score_Q, b.positive_score_Q),
        torch.maximum(a.best_negative_Q, b.best_negative_Q),
        a.guided_Q + b.guided_Q,
    )


def block_gradients(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    positive_Q: torch.Tensor,
    lse_Q: torch.Tensor,
    weight_Q: torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
    tile_mib: float = TILE_MIB,
    precision: Precision = "fp32",
) -> BlockGradients:
    """Returns one block's share of the gradient of Σ_q weight · (lse − positive score); recomputes scores.

    Args:
        lse_Q: over the documents of *all* blocks (`merge_statistics`), so that the shares add up.
        weight_Q: the upstream gradient of each query's loss.

    The other arguments are those of `block_log_sum_exp`. Sums over blocks give the whole gradients.
    """
    others = (positive_Q, query_id_Q, document_id_N, score_limit_Q)
    block = _block(query_QD, document_ND, scale, others, guide, hardness, precision)
    with computed_in(precision):
        return _block_gradients(block, lse_Q, weight_Q, tile_mib)


def info_nce(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    positive_Q: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
    tile_mib: float = TILE_MIB,
    precision: Precision = "fp32",
) -> InfoNce:
    """Returns the loss of each query over all documents.

    It has a gradient for query, document and a tensor `scale`. Memory beyond the vectors and their gradients
    is about one tile.

    Gradients are computed with the loss while the tile is there: three matrix products, as with the full
    matrix. The documents' gradient is then summed for equal upstream weights. If the weights differ from row
    to row, backward computes it again from recomputed scores: five products in all. For fp16 and bf16 its
    fp32 total would take as much memory as two gradients. So only backward computes it, from recomputed
    scores: four products in all.
    """
    if len(positive_Q) and not 0 <= int(positive_Q.min()) <= int(positive_Q.max()) < len(document_ND):
        raise ValueError(f"positive_Q must be rows of document_ND, 0 to {len(document_ND) - 1}")
    others = (positive_Q, query_id_Q, document_id_N, score_limit_Q)
    if torch.is_grad_enabled():
        options = (hardness, tile_mib, precision)
        return InfoNce(*_InfoNce.apply(query_QD, document_ND, scale, others, guide, options))
    block = _block(query_QD, document_ND, scale, others, guide, hardness, precision)
    with computed_in(precision):
        return _outcome(_statistics(block, tile_mib))


def _block(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    scale: float | torch.Tensor,
    others: Sequence[torch.Tensor | None],
    guide: Guide | None,
    hardness: float,
    precision: Precision,
) -> Block:
    """Makes a block. Args: others: `positive_Q`, `query_id_Q`, `document_id_N`, `score_limit_Q`."""
    positive_Q, query_id_Q, document_id_N, score_limit_Q = others
    assert positive_Q is not None
    return Block(
        round_operand(query_QD, precision),
        round_operand(document_ND, precision),
        float(scale),
        positive_Q,
        query_id_Q,
        document_id_N,
        score_limit_Q,
        guide,
        hardness,
    )


def _outcome(statistics: BlockStatistics) -> InfoNce:
    lse_Q, positive_Q, negative_Q, guided_Q = statistics
    return InfoNce(lse_Q - positive_Q, positive_Q > negative_Q, lse_Q, guided_Q)


def _tiles(block: Block, tile_mib: float) -> Iterator[tuple[slice, Epilogue, torch.Tensor | None]]:
    """Yields rows, the epilogue of their scores, and how many documents the guide leaves out."""
    epilogue: type[Epilogue] = TorchEpilogue
    if runs_triton(block.query_QD.device):
        from llm2vec_kernels.info_nce.triton import TritonEpilogue  # here, for machines without Triton

        epilogue = TritonEpilogue
    for rows, score_BN, guided_B in score_tiles(block, tile_mib):
        own = block.part(rows)
        if own.score_limit_Q is not None:  # the limit is one for scores before the lift
            own = replace(own, score_limit_Q=own.score_limit_Q * block.lift)
        yield rows, epilogue(own, score_BN), guided_B


def _statistics(block: Block, tile_mib: float, sums: _Sums | None = None) -> BlockStatistics:
    """Returns the whole block's statistics. `sums`, if given, add up gradients for equal weights."""
    out = BlockStatistics(*block.query_QD.new_zeros(4, len(block.query_QD), dtype=block.score_dtype))
    for rows, tile, guided_B in _tiles(block, tile_mib):
        own = tile.statistics()
        for whole, part in zip(out[:3], own, strict=True):
            whole[rows] = part
        if guided_B is not None:
            out.guided_Q[rows] = guided_B
        out.best_negative_Q[rows] /= block.lift
        if sums is not None:
            sums.add(rows, tile.coefficients(own.lse_Q, sums.factor))
    return out


def _block_gradients(
    block: Block, lse_Q: torch.Tensor, weight_Q: torch.Tensor, tile_mib: float
) -> BlockGradients:
    weight_Q = weight_Q.to(block.score_dtype)
    relative_Q, largest = _relative(weight_Q)
    sums = _Sums(block, query=True, document=True)
    for rows, tile, _ in _tiles(block, tile_mib):
        sums.add(rows, tile.coefficients(lse_Q[rows], sums.factor), relative_Q[rows])
    return BlockGradients(
        sums.query_QD.mul_(weight_Q[:, None]),
        sums.document_ND.mul_(block.scale * largest / sums.factor),
        (weight_Q * sums.slope_Q).sum(),
    )


def _document_gradient(
    block: Block, lse_Q: torch.Tensor, weight_Q: torch.Tensor, tile_mib: float, like_ND: torch.Tensor
) -> torch.Tensor:
    """Returns the documents' gradient in the dtype of `like_ND`, a few documents at a time."""
    relative_Q, largest = _relative(weight_Q.to(block.score_dtype))
    out_ND = torch.empty_like(like_ND)
    for documents in slices(len(out_ND), documents_of_a_tile(block, tile_mib)):
        part = block.part(documents=documents)
        sums = _Sums(part, query=False, document=True)
        for rows, tile, _ in _tiles(part, tile_mib):
            sums.add(rows, tile.coefficients(lse_Q[rows], sums.factor, relative_Q[rows]))
        out_ND[documents] = sums.document_ND.mul_(block.scale * largest / sums.factor).to(out_ND.dtype)
    return out_ND


def _relative(weight_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights as shares of the largest, which fp16 can hold, and the largest."""
    largest = weight_Q.abs().amax() if len(weight_Q) else weight_Q.new_ones(())
    largest = largest.masked_fill(largest == 0, 1.0)
    return weight_Q / largest, largest


class _Sums:
    """`query_QD` = scale · Σ_d g d, `document_ND` = factor · Σ_q w g q, `slope_Q` = q · Σ_d g d."""

    def __init__(
        self, block: Block, *, query: bool, document: bool, query_dtype: torch.dtype | None = None
    ) -> None:
        """Args: query_dtype: of `query_QD`; None: that of the scores."""
        self.block = block
        self.with_query, self.with_document = query, document
        # A softmax over 10^5 documents has shares of 10^-5, below fp16's normal numbers (2^-14 = 6·10^-5).
        # So coefficients, at most 1, are raised to at most 2^15, below fp16's largest number 65,504.
        self.factor = 2.0**15 if block.operand_dtype == torch.float16 else 1.0
        wide = block.score_dtype
        if query:
            self.query_QD = torch.empty_like(block.query_QD, dtype=query_dtype or wide)
            self.slope_Q = block.query_QD.new_empty(len(block.query_QD), dtype=wide)
        if document:
            self.document_ND = torch.zeros_like(block.document_ND, dtype=wide)

    def add(self, rows: slice, coefficient_BN: torch.Tensor, relative_B: torch.Tensor | None = None) -> None:
        """Adds one tile's factor · g. `relative_B` weighs rows for `document_ND` if the tile does not."""
        query_BD = self.block.query_QD[rows]
        if self.with_query:
            sum_BD = torch.empty_like(query_BD, dtype=self.block.score_dtype)
            for documents, document_CD in document_chunks(self.block):
                multiply = product if documents.start == 0 else add_product
                multiply(coefficient_BN[:, documents], document_CD, sum_BD)
            sum_BD /= self.factor
            self.slope_Q[rows] = (query_BD * sum_BD).sum(1)
            self.query_QD[rows] = sum_BD.mul_(self.block.scale)
        if self.with_document:
            if relative_B is not None:
                query_BD = query_BD * relative_B[:, None]
            query_BD = query_BD.to(coefficient_BN.dtype)
            in_place = coefficient_BN.dtype == self.document_ND.dtype  # else each chunk's product is held
            n_documents, width = self.document_ND.shape
            for documents in slices(n_documents, n_documents if in_place else max(1, HELD_ELEMENTS // width)):
                add_product(coefficient_BN[:, documents].T, query_BD, self.document_ND[documents])


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QD: torch.Tensor,
        document_ND: torch.Tensor,
        scale: float | torch.Tensor,
        others: tuple[torch.Tensor | None, ...],
        guide: Guide | None,
        options: tuple[float, float, Precision],
    ) -> tuple[torch.Tensor, ...]:
        hardness, tile_mib, precision = options
        wide = query_QD.dtype
        block = _block(query_QD, document_ND, scale, others, guide, hardness, precision)
        needs_query, needs_document, needs_scale = ctx.needs_input_grad[:3]
        with computed_in(precision):
            sums = _Sums(
                block,
                query=needs_query or needs_scale,
                document=needs_document and wide == block.score_dtype,
                query_dtype=wide,
            )
            outcome = _outcome(_statistics(block, tile_mib, sums if any(ctx.needs_input_grad) else None))
        ctx.save_for_backward(query_QD, document_ND, outcome.lse_Q, *others, *(guide or ()))
        ctx.sums, ctx.scale, ctx.options = sums, scale, options
        ctx.mark_non_differentiable(outcome.hit_Q, outcome.lse_Q, outcome.guided_Q)
        return tuple(outcome)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_Q: torch.Tensor, *unused: None) -> tuple[torch.Tensor | None, ...]:
        query_QD, document_ND, lse_Q, *others = ctx.saved_tensors
        guide = Guide(*others[4:]) if others[4:] else None
        hardness, tile_mib, precision = ctx.options
        block = _block(query_QD, document_ND, ctx.scale, others[:4], guide, hardness, precision)
        gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
        with computed_in(precision):
            sums, ctx.sums = ctx.sums, None
            if sums is None:  # a second backward through one graph: the first has overwritten the sums
                whole = _block_gradients(block, lse_Q, weight_Q, tile_mib)
                gradients = whole.d_query_QD.to(query_QD), whole.d_document_ND.to(document_ND), whole.d_scale
            else:
                gradients = _finish(
                    sums, lse_Q, weight_Q, tile_mib, document_ND if ctx.needs_input_grad[1] else None
                )
        d_query_QD, d_document_ND, d_scale = gradients
        if isinstance(ctx.scale, torch.Tensor) and d_scale is not None:
            d_scale = d_scale.to(ctx.scale).view_as(ctx.scale)
        else:
            d_scale = None
        return d_query_QD, d_document_ND, d_scale, None, None, None


def _finish(
    sums: _Sums,
    lse_Q: torch.Tensor,
    weight_Q: torch.Tensor,
    tile_mib: float,
    document_ND: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns the gradients of query, document and scale. It overwrites forward's sums.

    Args:
        document_ND: its gradient gets the same shape and dtype. None: no gradient is needed.
    """
    block = sums.block
    d_query_QD = d_document_ND = d_scale = None
    if sums.with_query:
        d_scale = (weight_Q * sums.slope_Q).sum()
        d_query_QD = sums.query_QD.mul_(weight_Q[:, None])
    # ∂/∂d = scale · Σ_q w_q g_qd q. Forward has Σ_q g_qd q, so this needs equal weights, which leave the sum.
    if sums.with_document and len(weight_Q) and bool((weight_Q == weight_Q[:1]).all()):
        d_document_ND = sums.document_ND.mul_(block.scale * weight_Q[:1])
    elif document_ND is not None:
        if sums.with_document:
            del sums.document_ND  # frees the useless total before another one is made
        d_document_ND = _document_gradient(block, lse_Q, weight_Q, tile_mib, document_ND)
    return d_query_QD, d_document_ND, d_scale
