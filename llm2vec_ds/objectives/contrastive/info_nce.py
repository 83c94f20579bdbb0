"""InfoNCE over the global batch: every rank's queries against every rank's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llm2vec_kernels.info_nce.api import info_nce

from llm2vec_ds.distributed import all_gather_counts, all_reduce_sum, gather_rows, rank
from llm2vec_ds.objectives.contrastive.known_positives import KnownPositives, Texts, with_pairs_not_known
from llm2vec_ds.objectives.contrastive.ring import ring_info_nce
from llm2vec_ds.recipe.objectives import ContrastiveConfig


@dataclass(frozen=True)
class PairVectors:
    """This rank's part of the batch. Row i of `positive_QD` is right for query i.

    Attributes:
        query_QD, positive_QD: `[Q, D]`, of any length.
        negative_MD: `[M, D]` hard negatives of all queries, M from 0.
        query_id_Q, positive_id_Q, negative_id_M: int64, equal for equal texts on every rank.
    """

    query_QD: torch.Tensor
    positive_QD: torch.Tensor
    negative_MD: torch.Tensor
    query_id_Q: torch.Tensor
    positive_id_Q: torch.Tensor
    negative_id_M: torch.Tensor


class ContrastiveLoss:
    """loss_i = −log ( exp(s · cos(q_i, p_i)) / Σ_d exp(s · cos(q_i, d)) ), averaged over all ranks' queries.

    The sum runs over all ranks' positives and hard negatives d, except those known to be false negatives
    (van den Oord et al., 2018, arXiv 1807.03748; Karpukhin et al., 2020, arXiv 2004.04906): texts that are
    a positive of the same query in any row (`known_positives.py`). Neither value nor gradient depends on how
    ranks share the batch.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self.wire_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.exchange_precision]

    def __call__(self, vectors: PairVectors, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss (shares add up to it), and how many of its queries find their
        positive before all else."""
        n_queries = len(vectors.query_QD)
        n_global = float(all_reduce_sum(torch.tensor(float(n_queries), device=vectors.query_QD.device)))
        known = KnownPositives.of(vectors.query_id_Q, vectors.positive_id_Q)
        back = KnownPositives.of(vectors.positive_id_Q, vectors.query_id_Q) if self.config.symmetric else None
        dims = self.config.matryoshka_dims or [vectors.query_QD.shape[1]]
        share = vectors.query_QD.new_zeros((), dtype=torch.float32)
        for dim in dims:
            part, hits = self._at_width(vectors, scale, dim, known, back)
            share = share + part / (len(dims) * n_global)
        return share, hits

    def _at_width(
        self,
        vectors: PairVectors,
        scale: torch.Tensor,
        dim: int,
        known: KnownPositives,
        back: KnownPositives | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of this rank's queries on the vectors' first `dim` components, and the hits.

        `back`: the queries that are known to be right for a positive, for the symmetric loss.
        """
        query_QD, positive_QD, negative_MD = (
            F.normalize(x[:, :dim].float(), dim=-1)
            for x in (vectors.query_QD, vectors.positive_QD, vectors.negative_MD)
        )
        document_id = torch.cat([vectors.positive_id_Q, vectors.negative_id_M])
        queries = Texts(query_QD, vectors.query_id_Q)
        documents = Texts(torch.cat([positive_QD, negative_MD]), document_id)
        loss_Q, hit_Q = self._against_all_ranks(queries, documents, known, scale)
        total = loss_Q.sum()
        if back is not None:
            positives = Texts(positive_QD, vectors.positive_id_Q)
            back_Q, _ = self._against_all_ranks(positives, queries, back, scale)
            total = (total + back_Q.sum()) / 2
        return total, hit_Q.sum()

    def _against_all_ranks(
        self, queries: Texts, documents: Texts, known: KnownPositives, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and hit `[Q]`; the first Q of this rank's documents are its queries' positives."""
        limit_Q = None
        if self.config.false_negative_margin is not None:
            cosine_Q = (queries.vector_ND * documents.vector_ND[: len(queries)]).sum(-1).detach()
            limit_Q = scale.detach() * (cosine_Q + self.config.false_negative_margin)
        group_R = known.groups(documents.id_N)
        loss_Q, hit_Q = self._without_groups(queries, documents, group_R, scale, limit_Q)
        if not len(known.incomplete):
            return loss_Q, hit_Q
        return with_pairs_not_known(
            loss_Q, hit_Q, queries, documents, group_R, known, scale, limit_Q, self.wire_dtype
        )

    def _without_groups(
        self,
        queries: Texts,
        documents: Texts,
        group_R: torch.Tensor,
        scale: torch.Tensor,
        limit_Q: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same where each query leaves out all documents of its group but its own positive."""
        query_QD, document_RD, query_group_Q = queries.vector_ND, documents.vector_ND, group_R[: len(queries)]
        if self.config.exchange == "ring":
            return ring_info_nce(
                query_QD,
                document_RD,
                group_R,
                scale=scale,
                query_id_Q=query_group_Q,
                score_limit_Q=limit_Q,
                wire_dtype=self.wire_dtype,
            )
        counts = all_gather_counts(len(document_RD), query_QD.device)
        result = info_nce(
            query_QD,
            gather_rows(document_RD, self.wire_dtype),
            sum(counts[: rank()]) + torch.arange(len(query_QD), device=query_QD.device),
            scale=scale,
            query_id_Q=query_group_Q,
            document_id_N=gather_rows(group_R),
            score_limit_Q=limit_Q,
        )
        return result.loss_Q, result.hit_Q


def check_widths(dims: Sequence[int] | None, width: int) -> str | None:
    """What is wrong with Matryoshka lengths for vectors of this width; None where nothing is."""
    if dims and max(dims) > width:
        return f"matryoshka_dims {max(dims)} is over the model's width {width}: lower it"
    return None
