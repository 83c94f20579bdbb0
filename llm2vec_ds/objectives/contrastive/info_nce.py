"""InfoNCE over the global batch: every rank's queries against every rank's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llm2vec_kernels.info_nce.api import info_nce
from llm2vec_kernels.info_nce.tiles import Guide

from llm2vec_ds.distributed import all_gather_counts, all_reduce_sum, gather_rows, rank
from llm2vec_ds.objectives.contrastive.known_positives import KnownPositives, with_pairs_not_known
from llm2vec_ds.objectives.contrastive.own_negatives import against_own_negatives
from llm2vec_ds.objectives.contrastive.ring import ring_info_nce
from llm2vec_ds.objectives.contrastive.rounding import Form, rounded
from llm2vec_ds.objectives.contrastive.texts import Limits, Outcome, Texts
from llm2vec_ds.objectives.similarities import TaughtTexts, similarity_loss
from llm2vec_ds.recipe.objectives import ContrastiveConfig, SupervisedConfig


class PairGuide(NamedTuple):
    """The guide's vectors, of length 1, of the texts of `PairVectors`."""

    query_QG: torch.Tensor
    positive_QG: torch.Tensor
    negative_MG: torch.Tensor


class OwnNegatives(NamedTuple):
    """Which queries are compared with their own hard negatives alone, bool `[Q]`; and which query each hard
    negative came with, int64 `[M]`, in ascending order."""

    alone_Q: torch.Tensor
    query_of_M: torch.Tensor


@dataclass(frozen=True)
class PairVectors:
    """This rank's part of the batch. Row i of `positive_QD` is right for query i.

    Attributes:
        query_QD, positive_QD: `[Q, D]`, of any length.
        negative_MD: `[M, D]` hard negatives of all queries, M from 0.
        query_id_Q, positive_id_Q, negative_id_M: int64, equal for equal texts on every rank.
        guide: on every rank or on none.
        own: on every rank or on none; none: all queries have in-batch negatives.
    """

    query_QD: torch.Tensor
    positive_QD: torch.Tensor
    negative_MD: torch.Tensor
    query_id_Q: torch.Tensor
    positive_id_Q: torch.Tensor
    negative_id_M: torch.Tensor
    guide: PairGuide | None = None
    own: OwnNegatives | None = None

    def texts(self, dim: int, form: Form) -> tuple[Texts, Texts, Texts]:
        """Queries, positives and negatives, of the vectors' first `dim` components; documents in `form`."""
        vectors = (self.query_QD, self.positive_QD, self.negative_MD)
        query_QD, *documents = (F.normalize(x[:, :dim].float(), dim=-1) for x in vectors)
        unit = (query_QD, *(rounded(x, form) for x in documents))
        ids = (self.query_id_Q, self.positive_id_Q, self.negative_id_M)
        queries, positives, negatives = map(Texts, unit, ids, self.guide or (None, None, None))
        return queries, positives, negatives


class LossOutcome(NamedTuple):
    """`share`: this rank's part of the loss (shares add up to it); `n_hits`: how many of its queries find
    their positive before all else; `guided_Q`: how many documents the guide leaves out for each query."""

    share: torch.Tensor
    n_hits: torch.Tensor
    guided_Q: torch.Tensor


class ContrastiveLoss:
    """loss_i = −log ( exp(s · cos(q_i, p_i)) / Σ_d exp(s · cos(q_i, d)) ), averaged over all ranks' queries.

    The sum runs over all ranks' positives and hard negatives d, except those known to be false negatives
    (van den Oord et al., 2018, arXiv 1807.03748; Karpukhin et al., 2020, arXiv 2004.04906): texts that are
    a positive of the same query in any row (`known_positives.py`), and those that a guide takes to be right
    (`texts.Limits`). A query of a source without in-batch negatives has its own hard ones alone
    (`own_negatives.py`). With Matryoshka lengths, or documents in fewer bytes (`rounding.py`), it is the mean
    of one such loss for each length and form. Neither value nor gradient depends on how ranks share the
    batch.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self.wire_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.exchange_precision]

    def __call__(self, vectors: PairVectors, scale: torch.Tensor) -> LossOutcome:
        device, n_queries = vectors.query_QD.device, len(vectors.query_QD)
        n_alone = int(vectors.own.alone_Q.sum()) if vectors.own is not None else 0
        counts = torch.tensor([n_queries, n_queries - n_alone], dtype=torch.float32, device=device)
        n_global, n_in_batch = all_reduce_sum(counts).tolist()
        known = KnownPositives.of(vectors.query_id_Q, vectors.positive_id_Q)
        back = KnownPositives.of(vectors.positive_id_Q, vectors.query_id_Q) if self.config.symmetric else None
        dims = self.config.matryoshka_dims or [vectors.query_QD.shape[1]]
        share = vectors.query_QD.new_zeros((), dtype=torch.float32)
        forms: list[Form] = [*(self.config.stored_as or []), "float32"]  # hits are those of the last
        for form, dim in product(forms, dims):
            texts = vectors.texts(dim, form)
            total, outcome = self._of_texts(
                *texts, vectors.own, scale, known, back, any_in_batch=n_in_batch > 0
            )
            share = share + total / (len(forms) * len(dims) * n_global)
        if (
            isinstance(self.config, SupervisedConfig)
            and self.config.guide_weight
            and vectors.guide is not None
        ):
            share = share + self.config.guide_weight * guided_share(vectors, self.config, n_global)
        return LossOutcome(share, outcome.hit_Q.sum(), outcome.guided_Q)

    def _of_texts(
        self,
        queries: Texts,
        positives: Texts,
        negatives: Texts,
        own: OwnNegatives | None,
        scale: torch.Tensor,
        known: KnownPositives,
        back: KnownPositives | None,
        *,
        any_in_batch: bool,
    ) -> tuple[torch.Tensor, Outcome]:
        """Summed loss of this rank's queries, and what they have each.

        Args:
            back: the queries that are known to be right for a positive, for the symmetric loss.
            any_in_batch: a query of some rank has in-batch negatives.
        """
        if own is None:
            return self._in_batch(queries, positives, negatives, len(queries), known, back, scale)
        # First those with in-batch negatives, whose documents are then first, too.
        order = own.alone_Q.to(torch.int8).argsort(stable=True)
        n_first = len(queries) - int(own.alone_Q.sum())
        place = order.argsort()
        parts, total = [], scale.new_zeros(())
        if any_in_batch:
            total, first = self._in_batch(
                queries[order], positives[order], negatives, n_first, known, back, scale
            )
            parts.append(first)
        alone = order[n_first:]
        of_alone = own.alone_Q[own.query_of_M]
        second = against_own_negatives(
            queries[alone],
            positives[alone],
            negatives[of_alone],
            place[own.query_of_M[of_alone]] - n_first,
            known,
            scale,
            Limits.of(queries[alone], positives[alone], scale, self.config),
            self.config.hardness,
        )
        together = (torch.cat(column)[place] for column in zip(*parts, second, strict=True))
        return total + second.loss_Q.sum(), Outcome(*together)

    def _in_batch(
        self,
        queries: Texts,
        positives: Texts,
        negatives: Texts,
        n_first: int,
        known: KnownPositives,
        back: KnownPositives | None,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, Outcome]:
        """Summed loss of the first `n_first` queries against all texts, and what they have each."""
        outcome = self._against_all_ranks(queries[:n_first], positives + negatives, known, scale)
        total = outcome.loss_Q.sum()
        if back is not None:
            total = (
                total + self._against_all_ranks(positives[:n_first], queries, back, scale).loss_Q.sum()
            ) / 2
        return total, outcome

    def _against_all_ranks(
        self, queries: Texts, documents: Texts, known: KnownPositives, scale: torch.Tensor
    ) -> Outcome:
        """The first Q of this rank's documents are its queries' positives."""
        limits = Limits.of(queries, documents[: len(queries)], scale, self.config)
        group_R = known.groups(documents.id_N)
        outcome = self._without_groups(queries, documents, group_R, scale, limits)
        if not len(known.incomplete):
            return outcome
        return with_pairs_not_known(
            outcome, queries, documents, group_R, known, scale, limits, self.config.hardness, self.wire_dtype
        )

    def _without_groups(
        self, queries: Texts, documents: Texts, group_R: torch.Tensor, scale: torch.Tensor, limits: Limits
    ) -> Outcome:
        """The same where each query leaves out all documents of its group but its own positive."""
        query_QD, document_RD, query_group_Q = queries.vector_ND, documents.vector_ND, group_R[: len(queries)]
        guide = None
        if queries.guide_NG is not None and documents.guide_NG is not None and limits.guide_Q is not None:
            guide = Guide(queries.guide_NG, documents.guide_NG, limits.guide_Q)
        if self.config.exchange == "ring":
            return ring_info_nce(
                query_QD,
                document_RD,
                group_R,
                scale=scale,
                query_id_Q=query_group_Q,
                score_limit_Q=limits.score_Q,
                guide=guide,
                hardness=self.config.hardness,
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
            score_limit_Q=limits.score_Q,
            guide=guide._replace(document_NG=gather_rows(guide.document_NG)) if guide else None,
            hardness=self.config.hardness,
        )
        return Outcome(result.loss_Q, result.hit_Q, result.guided_Q)


def guided_share(vectors: PairVectors, config: SupervisedConfig, n_global: float) -> torch.Tensor:
    """This rank's share of the mean loss of all queries' cosines with all documents, against the guide's. A
    document of the query's own text does not count."""
    queries, positives, negatives = vectors.texts(vectors.query_QD.shape[1], "float32")
    documents = positives + negatives
    assert queries.guide_NG is not None
    assert documents.guide_NG is not None
    rows = TaughtTexts(queries.vector_ND, queries.guide_NG, queries.id_N)
    own = TaughtTexts(documents.vector_ND, documents.guide_NG, documents.id_N)
    columns = TaughtTexts(*map(gather_rows, own))
    return similarity_loss(rows, columns, config.guide_loss, config.guide_temperature).sum() / n_global


def check_widths(dims: Sequence[int] | None, width: int) -> str | None:
    """What is wrong with Matryoshka lengths for vectors of this width; None where nothing is."""
    if dims and max(dims) > width:
        return f"matryoshka_dims {max(dims)} is over the model's width {width}: lower it"
    return None
