"""InfoNCE around a ring of ranks: a rank holds one other rank's documents at a time.

Each rank's documents travel from rank to rank; log-sum-exps of the blocks are merged exactly. Backward
sends the documents around once more, and with each block the sum of the gradients that the ranks have for
it, which is whole when the block is home again (cf. Cheng et al., 2024, arXiv 2410.17243). Memory does not
grow with the number of ranks.

Shape legend: Q this rank's queries, R a rank's documents, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from llm2vec_kernels.info_nce.api import block_gradients, block_log_sum_exp, merge_statistics
from torch.autograd.function import once_differentiable

from llm2vec_ds.distributed import all_gather_counts, rank, rotate, world_size

NOT_HERE = -1


def ring_info_nce(
    query_QD: torch.Tensor,
    document_RD: torch.Tensor,
    document_id_R: torch.Tensor,
    *,
    scale: torch.Tensor,
    query_id_Q: torch.Tensor,
    score_limit_Q: torch.Tensor | None,
    wire_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss `[Q]` and hit `[Q]` of this rank's queries against all ranks' documents.

    The first Q documents are the queries' positives. Documents are rounded to `wire_dtype` (on every
    rank alike); gradients travel in fp32. Ranks may hold different numbers of documents.
    """
    documents = (document_id_R, query_id_Q, score_limit_Q, wire_dtype)
    loss_Q, hit_Q = _RingInfoNce.apply(query_QD, document_RD, scale, documents)
    return loss_Q, hit_Q


def _blocks(
    document_RD: torch.Tensor, document_id_R: torch.Tensor, counts: list[int]
) -> Iterator[tuple[int, Any, Any]]:
    """(owner, documents, ids) of every rank, this one first. Each `next` is a rotation of all ranks."""
    document, ids = _padded(document_RD, max(counts)), _padded(document_id_R, max(counts))
    for turn in range(world_size()):
        owner = (rank() - turn) % world_size()
        yield owner, document[: counts[owner]], ids[: counts[owner]]
        if turn + 1 < world_size():
            document, ids = rotate(document), rotate(ids)


def _padded(x: torch.Tensor, n_rows: int) -> torch.Tensor:
    out = x.new_zeros(n_rows, *x.shape[1:])
    out[: len(x)] = x
    return out


class _RingInfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_QD: torch.Tensor, document_RD: torch.Tensor, scale: torch.Tensor, others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        document_id_R, query_id_Q, limit_Q, wire_dtype = others
        sent_RD = document_RD.to(wire_dtype)
        ctx.scale, ctx.counts = float(scale), all_gather_counts(len(document_RD), document_RD.device)
        blocks = _blocks(sent_RD, document_id_R, ctx.counts)
        each = (
            block_log_sum_exp(query_QD, block.float(), **_options(ctx, owner, ids, query_id_Q, limit_Q))
            for owner, block, ids in blocks
        )
        statistics = reduce(merge_statistics, each)
        ctx.save_for_backward(query_QD, sent_RD, document_id_R, query_id_Q, limit_Q, statistics.lse_Q)
        hit_Q = statistics.positive_score_Q > statistics.best_negative_Q
        ctx.mark_non_differentiable(hit_Q)
        return statistics.lse_Q - statistics.positive_score_Q, hit_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_Q: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        query_QD, sent_RD, document_id_R, query_id_Q, limit_Q, lse_Q = ctx.saved_tensors
        d_query_QD = torch.zeros_like(query_QD)
        d_scale = weight_Q.new_zeros(())
        travelling: torch.Tensor | None = None
        for owner, block, ids in _blocks(sent_RD, document_id_R, ctx.counts):
            own = block_gradients(
                query_QD,
                block.float(),
                lse_Q=lse_Q,
                weight_Q=weight_Q,
                **_options(ctx, owner, ids, query_id_Q, limit_Q),
            )
            d_query_QD += own.d_query_QD
            d_scale += own.d_scale
            # The gradient that arrives belongs to the block that arrived with it.
            arrived = rotate(travelling) if travelling is not None else None
            travelling = _padded(own.d_document_ND, max(ctx.counts))
            if arrived is not None:
                travelling += arrived
        assert travelling is not None
        d_document_RD = rotate(travelling)[: len(sent_RD)]
        return d_query_QD, d_document_RD, d_scale, None


def _options(
    ctx: Any, owner: int, ids: torch.Tensor, query_id_Q: torch.Tensor, limit_Q: torch.Tensor | None
) -> dict[str, Any]:
    row_Q = torch.arange(len(query_id_Q), device=query_id_Q.device)
    return {
        "scale": ctx.scale,
        "positive_Q": row_Q if owner == rank() else torch.full_like(row_Q, NOT_HERE),
        "query_id_Q": query_id_Q,
        "document_id_N": ids,
        "score_limit_Q": limit_Q,
    }
