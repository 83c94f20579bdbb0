"""The sum of InfoNCE's denominator over texts that hold no positive, in tiles.

    lse(q) = log Σ_d exp score(q, d)

Examples are queries against queries, and positives against documents. Such texts become further negatives of
a loss by `logaddexp(loss, lse − score of the positive)` (Li et al., 2023, arXiv 2308.03281).

Shape legend: Q queries, N documents, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from llm2vec_kernels.info_nce.api import TILE_MIB, block_gradients, block_log_sum_exp
from llm2vec_kernels.info_nce.tiles import Guide, Precision


class LogSumExp(NamedTuple):
    """`lse_Q`: fp32 (fp64 for fp64), differentiable, −inf if no document counts. `guided_Q`: how many
    documents the guide leaves out beyond those that ids leave out."""

    lse_Q: torch.Tensor
    guided_Q: torch.Tensor


def log_sum_exp(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
    tile_mib: float = TILE_MIB,
    precision: Precision = "fp32",
) -> LogSumExp:
    """Returns the log-sum-exp of each query over all documents that count.

    It is differentiable in query, document and a tensor `scale`. Arguments are those of `block_log_sum_exp`,
    without a positive: every document of the query's id is left out. A query for which no document counts has
    no gradient. Backward recomputes the scores, so there are four matrix products in all. Memory beyond the
    vectors and their gradients is about one tile.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    others = {
        "query_id_Q": query_id_Q,
        "document_id_N": document_id_N,
        "score_limit_Q": score_limit_Q,
        "guide": guide,
        "hardness": hardness,
        "tile_mib": tile_mib,
        "precision": precision,
    }
    return LogSumExp(*_LogSumExp.apply(query_QD, document_ND, scale, others))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QD: torch.Tensor,
        document_ND: torch.Tensor,
        scale: float | torch.Tensor,
        others: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nobody_Q = torch.full((len(query_QD),), -1, device=query_QD.device)
        statistics = block_log_sum_exp(query_QD, document_ND, scale=scale, positive_Q=nobody_Q, **others)
        ctx.save_for_backward(query_QD, document_ND, statistics.lse_Q, nobody_Q)
        ctx.scale, ctx.others = scale, others
        ctx.mark_non_differentiable(statistics.guided_Q)
        return statistics.lse_Q, statistics.guided_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_Q: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        query_QD, document_ND, lse_Q, nobody_Q = ctx.saved_tensors
        whole = block_gradients(
            query_QD,
            document_ND,
            scale=ctx.scale,
            positive_Q=nobody_Q,
            lse_Q=lse_Q,
            weight_Q=weight_Q,
            **ctx.others,
        )
        d_scale = None
        if isinstance(ctx.scale, torch.Tensor):
            d_scale = whole.d_scale.to(ctx.scale).view_as(ctx.scale)
        return whole.d_query_QD.to(query_QD), whole.d_document_ND.to(document_ND), d_scale, None
