"""InfoNCE over the global batch: every rank's queries against every rank's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llm2vec_ds.distributed import all_reduce_sum, gather_rows
from llm2vec_ds.objectives.contrastive.candidates import Candidates, Rows
from llm2vec_ds.objectives.contrastive.known_positives import (
    ConnectedTexts,
    KnownPositives,
    with_pairs_not_known,
)
from llm2vec_ds.objectives.contrastive.own_negatives import against_own_negatives
from llm2vec_ds.objectives.contrastive.rounding import Form, rounded
from llm2vec_ds.objectives.contrastive.same_side import SameSide, same_side
from llm2vec_ds.objectives.contrastive.texts import Limits, Outcome, Texts, positive_scores
from llm2vec_ds.objectives.similarities import TaughtVectors, similarity_loss
from llm2vec_ds.recipe.objectives import ContrastiveConfig, SupervisedConfig


class PairGuide(NamedTuple):
    """The guide's vectors, of length 1, for the texts of `PairVectors`."""

    query_QG: torch.Tensor
    positive_QG: torch.Tensor
    negative_MG: torch.Tensor


class OwnNegatives(NamedTuple):
    """Queries that are compared with their own hard negatives only.

    Attributes:
        alone_Q: True for these queries, bool `[Q]`.
        query_of_M: the query that each hard negative came with, int64 `[M]`, in ascending order.
    """

    alone_Q: torch.Tensor
    query_of_M: torch.Tensor


@dataclass(frozen=True)
class PairVectors:
    """This rank's part of the batch. Row i of `positive_QD` is the positive of query i.

    Attributes:
        query_QD, positive_QD: `[Q, D]`. The vectors may have any length.
        negative_MD: hard negatives of all queries, `[M, D]`. M may be 0.
        query_id_Q, positive_id_Q, negative_id_M: int64. Equal texts have equal ids on every rank.
        guide: set on every rank or on none.
        own: set on every rank or on none. None means that all queries have in-batch negatives.
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
        """Returns queries, positives and negatives, with the first `dim` components of their vectors.

        Documents are rounded to `form`.
        """
        vectors = (self.query_QD, self.positive_QD, self.negative_MD)
        query_QD, *documents = (F.normalize(x[:, :dim].float(), dim=-1) for x in vectors)
        unit = (query_QD, *(rounded(x, form) for x in documents))
        ids = (self.query_id_Q, self.positive_id_Q, self.negative_id_M)
        queries, positives, negatives = map(Texts, unit, ids, self.guide or (None, None, None))
        return queries, positives, negatives


class LossOutcome(NamedTuple):
    """The loss and the figures that a step reports.

    Attributes:
        share: this rank's share of the loss. The shares of all ranks add up to the loss.
        n_hits: how many of this rank's queries score their positive above every other document that counts.
        guided_Q: how many documents the guide leaves out for each query.
    """

    share: torch.Tensor
    n_hits: torch.Tensor
    guided_Q: torch.Tensor


class Known(NamedTuple):
    """The known pairs of a global batch in the form that the loss needs, the same on every rank.

    Attributes:
        positives: the documents that are right for each query.
        back: the queries that are right for each positive, for the symmetric loss.
        connected: texts that are no negatives of each other, if the loss has negatives from the same side.
    """

    positives: KnownPositives
    back: KnownPositives | None
    connected: ConnectedTexts | None

    @classmethod
    def of(cls, query_id_Q: torch.Tensor, positive_id_Q: torch.Tensor, config: ContrastiveConfig) -> Known:
        positives = KnownPositives.of(query_id_Q, positive_id_Q)
        back = KnownPositives.of(positive_id_Q, query_id_Q) if config.symmetric else None
        one_side = config.between_queries or config.between_documents
        return cls(positives, back, ConnectedTexts.of(positives) if one_side else None)


class ContrastiveLoss:
    """loss_i = −log ( exp(s · cos(q_i, p_i)) / Σ_d exp(s · cos(q_i, d)) ), averaged over all ranks' queries
    (van den Oord et al., 2018, arXiv 1807.03748; Karpukhin et al., 2020, arXiv 2004.04906).

    The sum runs over the positives and hard negatives d of all ranks. It leaves out false negatives:

    - texts that are a positive of the same query in any row (`known_positives.py`);
    - texts above a limit, which the model itself or a guide takes to be right (`texts.Limits`).

    A query of a source without in-batch negatives is compared with its own hard negatives only
    (`own_negatives.py`). The recipe can add negatives from the same side (`same_side.py`). With Matryoshka
    lengths, or with documents in fewer bytes (`rounding.py`), the loss is the mean over all lengths and
    forms. Neither value nor gradient depends on how the ranks share the batch.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self.wire_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.exchange_precision]

    def __call__(self, vectors: PairVectors, scale: torch.Tensor) -> LossOutcome:
        device, n_queries = vectors.query_QD.device, len(vectors.query_QD)
        n_alone = int(vectors.own.alone_Q.sum()) if vectors.own is not None else 0
        counts = torch.tensor([n_queries, n_queries - n_alone], dtype=torch.float32, device=device)
        n_global, n_in_batch = all_reduce_sum(counts).tolist()
        known = Known.of(vectors.query_id_Q, vectors.positive_id_Q, self.config)
        dims = self.config.matryoshka_dims or [vectors.query_QD.shape[1]]
        share = vectors.query_QD.new_zeros((), dtype=torch.float32)
        # The loop's last turn is float32 with the last length. Its hits are the ones reported.
        forms: list[Form] = [*(self.config.stored_as or []), "float32"]
        for form, dim in product(forms, dims):
            texts = vectors.texts(dim, form)
            total, outcome = self._of_texts(*texts, vectors.own, scale, known, any_in_batch=n_in_batch > 0)
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
        known: Known,
        *,
        any_in_batch: bool,
    ) -> tuple[torch.Tensor, Outcome]:
        """Returns the summed loss of this rank's queries, and the outcome of each.

        Args:
            any_in_batch: whether any rank has a query with in-batch negatives. If so, all ranks exchange
                documents together.
        """
        if own is None:
            return self._in_batch(queries, positives, negatives, len(queries), known, scale)
        # Queries with in-batch negatives go first. `_in_batch` expects their positives first, too.
        order = own.alone_Q.to(torch.int8).argsort(stable=True)
        n_first = len(queries) - int(own.alone_Q.sum())
        place = order.argsort()
        parts, total = [], scale.new_zeros(())
        if any_in_batch:
            total, first = self._in_batch(queries[order], positives[order], negatives, n_first, known, scale)
            parts.append(first)
        alone = order[n_first:]
        of_alone = own.alone_Q[own.query_of_M]
        second = against_own_negatives(
            queries[alone],
            positives[alone],
            negatives[of_alone],
            place[own.query_of_M[of_alone]] - n_first,
            known.positives,
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
        known: Known,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, Outcome]:
        """Returns the summed loss of the first `n_first` queries against all texts, and each outcome."""
        all_queries, all_documents = (
            Candidates(own, self.config, self.wire_dtype) for own in (queries, positives + negatives)
        )
        queries, positives = queries[:n_first], positives[:n_first]
        further = self._of_same_side(queries, positives, all_queries, all_documents, known.connected, scale)
        outcome = self._against(queries, positives, all_documents, known.positives, scale, further)
        total = outcome.loss_Q.sum()
        if known.back is not None:
            back = self._against(positives, queries, all_queries, known.back, scale, further)
            total = (total + back.loss_Q.sum()) / 2
        return total, outcome

    def _of_same_side(
        self,
        queries: Texts,
        positives: Texts,
        all_queries: Candidates,
        all_documents: Candidates,
        connected: ConnectedTexts | None,
        scale: torch.Tensor,
    ) -> SameSide | None:
        if connected is None:
            return None
        sides = [(queries, all_queries)] if self.config.between_queries else []
        sides += [(positives, all_documents)] if self.config.between_documents else []
        return same_side(sides, connected, Limits.of(queries, positives, scale, self.config), scale)

    def _against(
        self,
        queries: Texts,
        positives: Texts,
        candidates: Candidates,
        known: KnownPositives,
        scale: torch.Tensor,
        further: SameSide | None,
    ) -> Outcome:
        """Returns the outcome of each query. This rank's first Q candidates are the queries' positives.

        A hit has to beat the candidates only, not the further negatives from the same side.
        """
        limits = Limits.of(queries, positives, scale, self.config)
        label_R = known.groups(candidates.own.id_N)
        # Each query leaves out all documents of its group except its own positive. Some of these may be
        # negatives after all; `with_pairs_not_known` adds them.
        outcome = candidates.info_nce(Rows(queries, label_R[: len(queries)], label_R, limits), scale)
        if len(known.incomplete):
            outcome = with_pairs_not_known(
                outcome,
                queries,
                candidates.own,
                label_R,
                known,
                scale,
                limits,
                self.config.hardness,
                self.wire_dtype,
            )
        if further is None:
            return outcome
        positive_Q = positive_scores(queries, positives, scale, self.wire_dtype)
        return outcome._replace(
            loss_Q=further.added_to(outcome.loss_Q, positive_Q),
            guided_Q=outcome.guided_Q + further.guided_Q,
        )


def guided_share(vectors: PairVectors, config: SupervisedConfig, n_global: float) -> torch.Tensor:
    """Returns this rank's share of the guide's similarity loss: all queries' cosines with all documents.

    A document with the same text as the query does not count.
    """
    queries, positives, negatives = vectors.texts(vectors.query_QD.shape[1], "float32")
    documents = positives + negatives
    assert queries.guide_NG is not None
    assert documents.guide_NG is not None
    rows = TaughtVectors(queries.vector_ND, queries.guide_NG, queries.id_N)
    own = TaughtVectors(documents.vector_ND, documents.guide_NG, documents.id_N)
    columns = TaughtVectors(*map(gather_rows, own))
    return similarity_loss(rows, columns, config.guide_loss, config.guide_temperature).sum() / n_global


def check_widths(dims: Sequence[int] | None, width: int) -> str | None:
    """Returns what is wrong with these Matryoshka lengths for vectors of this width, or None."""
    if dims and max(dims) > width:
        return f"matryoshka_dims {max(dims)} is larger than the model's width {width}: lower it"
    return None
