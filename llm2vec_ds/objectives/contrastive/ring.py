"""InfoNCE around a ring of ranks. A rank holds the documents of one other rank at a time.

In forward, each rank's documents travel from rank to rank as one block. Each rank computes the log-sum-exp of
its queries over each block. Merging these is exact.

In backward, the documents travel around once more. A sum of gradients travels with each block, and each rank
adds its own part. After the last turn the sum is complete and back at the block's owner (cf. Cheng et al.,
2024, arXiv 2410.17243).

Memory does not grow with the number of ranks.

Shape legend: Q this rank's queries, R a rank's documents, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from llm2vec_kernels.info_nce.api import block_gradients, block_log_sum_exp, merge_statistics
from llm2vec_kernels.info_nce.log_sum_exp import LogSumExp
from llm2vec_kernels.info_nce.tiles import Guide, Precision
from torch.autograd.function import once_differentiable

from llm2vec_ds.distributed import all_gather_counts, rank, ring_shift, world_size
from llm2vec_ds.objectives.contrastive.texts import Outcome

NOT_HERE = -1
"""Place of a positive that is not in the block."""


def ring_info_nce(
    query_QD: torch.Tensor,
    document_RD: torch.Tensor,
    *,
    document_id_R: torch.Tensor,
    scale: torch.Tensor,
    query_id_Q: torch.Tensor,
    score_limit_Q: torch.Tensor | None,
    guide: Guide | None,
    hardness: float,
    precision: Precision,
    wire_dtype: torch.dtype,
) -> Outcome:
    """Returns the outcome of this rank's queries against all ranks' documents.

    The first Q of this rank's documents are the queries' positives. Documents are rounded to `wire_dtype` on
    every rank, the owner included. Gradients and a guide's vectors travel in fp32. Ranks may hold different
    numbers of documents.

    Args:
        guide: the guide's vectors of this rank's queries and documents.
    """
    others = (document_id_R, query_id_Q, score_limit_Q, guide, (hardness, precision), wire_dtype, True)
    return Outcome(*_Ring.apply(query_QD, document_RD, scale, others))


def ring_log_sum_exp(
    query_QD: torch.Tensor,
    document_RD: torch.Tensor,
    *,
    document_id_R: torch.Tensor,
    scale: torch.Tensor,
    query_id_Q: torch.Tensor,
    score_limit_Q: torch.Tensor | None,
    guide: Guide | None,
    hardness: float,
    precision: Precision,
    wire_dtype: torch.dtype,
) -> LogSumExp:
    """Returns the sum alone, for queries without a positive among the documents; −inf if none counts."""
    others = (document_id_R, query_id_Q, score_limit_Q, guide, (hardness, precision), wire_dtype, False)
    lse_Q, _, guided_Q = _Ring.apply(query_QD, document_RD, scale, others)
    return LogSumExp(lse_Q, guided_Q)


def _blocks(counts: list[int], *of_documents: torch.Tensor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields (owner, the owner's part of each tensor) for every rank, this rank first.

    Each `next` after the first rotates the blocks of all ranks.
    """
    # Every rotation sends one shape, so blocks are padded to the largest.
    travelling = [_padded(x, max(counts)) for x in of_documents]
    for turn in range(world_size()):
        owner = (rank() - turn) % world_size()
        yield owner, [x[: counts[owner]] for x in travelling]
        if turn + 1 < world_size():
            travelling = [ring_shift(x) for x in travelling]


def _padded(x: torch.Tensor, n_rows: int) -> torch.Tensor:
    out = x.new_zeros(n_rows, *x.shape[1:])
    out[: len(x)] = x
    return out


class _Ring(torch.autograd.Function):
    """Forward and backward around the ring. `others` holds the inputs that get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, query_QD: torch.Tensor, document_RD: torch.Tensor, scale: torch.Tensor, others: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        document_id_R, query_id_Q, limit_Q, guide, how, wire_dtype, ctx.with_positives = others
        ctx.hardness, ctx.precision = how
        ctx.scale, ctx.counts = float(scale), all_gather_counts(len(document_RD), document_RD.device)
        of_documents = [document_RD.to(wire_dtype), document_id_R]
        of_queries = [query_id_Q, limit_Q]
        if guide is not None:
            of_documents.append(guide.document_NG)
            of_queries += [guide.query_QG, guide.limit_Q]
        each = (
            block_log_sum_exp(query_QD, block.float(), **_options(ctx, owner, of_queries, *own_others))
            for owner, (block, *own_others) in _blocks(ctx.counts, *of_documents)
        )
        statistics = reduce(merge_statistics, each)
        ctx.n_of_documents = len(of_documents)
        ctx.save_for_backward(query_QD, statistics.lse_Q, *of_documents, *of_queries)
        hit_Q = statistics.positive_score_Q > statistics.best_negative_Q
        ctx.mark_non_differentiable(hit_Q, statistics.guided_Q)
        loss_Q = statistics.lse_Q
        if ctx.with_positives:
            loss_Q = loss_Q - statistics.positive_score_Q
        return loss_Q, hit_Q, statistics.guided_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_Q: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        query_QD, lse_Q, *others = ctx.saved_tensors
        of_documents, of_queries = others[: ctx.n_of_documents], others[ctx.n_of_documents :]
        d_query_QD = torch.zeros_like(query_QD)
        d_scale = weight_Q.new_zeros(())
        travelling: torch.Tensor | None = None
        for owner, (block, *own_others) in _blocks(ctx.counts, *of_documents):
            own = block_gradients(
                query_QD,
                block.float(),
                lse_Q=lse_Q,
                weight_Q=weight_Q,
                **_options(ctx, owner, of_queries, *own_others),
            )
            d_query_QD += own.d_query_QD
            d_scale += own.d_scale
            # Gradient and block have made the same turns, so the gradient that arrives belongs to this block.
            arrived = ring_shift(travelling) if travelling is not None else None
            travelling = _padded(own.d_document_ND, max(ctx.counts))
            if arrived is not None:
                travelling += arrived
        assert travelling is not None
        # One more turn brings each sum back to the owner of its block.
        d_document_RD = ring_shift(travelling)[: len(of_documents[0])]
        return d_query_QD, d_document_RD, d_scale, None


def _options(
    ctx: Any,
    owner: int,
    of_queries: list[Any],
    document_id_N: torch.Tensor,
    guide_NG: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Returns the kernel's options for one block. Positives are in this rank's own block only."""
    query_id_Q, score_limit_Q, *guide = of_queries
    row_Q = torch.arange(len(query_id_Q), device=query_id_Q.device)
    is_here = ctx.with_positives and owner == rank()
    return {
        "scale": ctx.scale,
        "hardness": ctx.hardness,
        "precision": ctx.precision,
        "positive_Q": row_Q if is_here else torch.full_like(row_Q, NOT_HERE),
        "query_id_Q": query_id_Q,
        "document_id_N": document_id_N,
        "score_limit_Q": score_limit_Q,
        "guide": None if guide_NG is None else Guide(guide[0], guide_NG, guide[1]),
    }
