"""Which documents of a global batch are right for which queries, beside each query's own positive.

A pair (q, p) is known where any row of any rank has the query q and the positive p, by their texts. Where it
is, the document p is no negative for q: neither in another row of q, nor among hard negatives.

The loss leaves out the documents of one id for each query. Queries and positives that known pairs connect are
a group, whose number is that id. In most groups every pair is known: a query with several positives, or a
positive of several queries. In the others ids leave out pairs that are not known, which are added afterwards,
so that no sum is ever the difference of two.

Shape legend: Q this rank's queries, R its documents; in groups that are not complete, B of its queries and
C documents of all ranks; D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llm2vec_ds.distributed import gather_rows
from llm2vec_ds.objectives.contrastive.texts import Limits, Outcome, Texts, positive_scores


@dataclass(frozen=True)
class KnownPositives:
    """The known pairs of a global batch, the same on every rank.

    Attributes:
        queries, positives: ids of the distinct texts, sorted.
        pairs: `query · len(positives) + positive` of each known pair, by their places there, sorted.
        group_of_positive: the least id among the positives of its group.
        incomplete: the groups in which a pair is not known, sorted.
    """

    queries: np.ndarray
    positives: np.ndarray
    pairs: np.ndarray
    group_of_positive: np.ndarray
    incomplete: np.ndarray

    @classmethod
    def of(cls, query_id_Q: torch.Tensor, positive_id_Q: torch.Tensor) -> KnownPositives:
        """From the rows of all ranks, which call this together."""
        rows = gather_rows(torch.stack([query_id_Q, positive_id_Q], 1)).cpu().numpy()
        queries, query = np.unique(rows[:, 0], return_inverse=True)
        positives, positive = np.unique(rows[:, 1], return_inverse=True)
        pairs = np.unique(query * len(positives) + positive)
        query, positive = np.divmod(pairs, len(positives))
        group_of_query, group_of_positive = _groups(query, positive, positives)
        wanted = _counts(group_of_query, positives) * _counts(group_of_positive, positives)
        incomplete = positives[_counts(group_of_query[query], positives) < wanted]
        return cls(queries, positives, pairs, group_of_positive, incomplete)

    def groups(self, text_id: torch.Tensor) -> torch.Tensor:
        """The group of each text that is a positive of any row; of others their own id."""
        return _labels(self.positives, self.group_of_positive, text_id)

    def in_incomplete(self, group_N: torch.Tensor) -> torch.Tensor:
        """Places `[C]` of the groups in which a pair is not known."""
        _, found = _places(self.incomplete, group_N.cpu().numpy())
        return torch.from_numpy(np.flatnonzero(found)).to(group_N.device)

    def are_known(self, query_id: torch.Tensor, positive_id: torch.Tensor) -> torch.Tensor:
        """Bool, of the shape to which both are broadcast."""
        query, of_query = _places(self.queries, query_id.cpu().numpy())
        positive, of_positive = _places(self.positives, positive_id.cpu().numpy())
        _, paired = _places(self.pairs, query * len(self.positives) + positive)
        return torch.from_numpy(of_query & of_positive & paired).to(query_id.device)


@dataclass(frozen=True)
class ConnectedTexts:
    """Texts that known pairs connect, directly or through others, whichever side they stand on.

    Attributes:
        texts: ids of all queries and positives, sorted.
        label_of_text: the least id among those that each is connected with.
    """

    texts: np.ndarray
    label_of_text: np.ndarray

    @classmethod
    def of(cls, known: KnownPositives) -> ConnectedTexts:
        query, positive = np.divmod(known.pairs, len(known.positives))
        both = np.concatenate([known.queries[query], known.positives[positive]])
        texts, text = np.unique(both, return_inverse=True)
        _, label_of_text = _groups(np.tile(np.arange(len(known.pairs)), 2), text, texts)
        return cls(texts, label_of_text)

    def labels(self, text_id: torch.Tensor) -> torch.Tensor:
        """Equal for connected texts; of a text in no pair its own id."""
        return _labels(self.texts, self.label_of_text, text_id)


def with_pairs_not_known(
    outcome: Outcome,
    queries: Texts,
    documents: Texts,
    group_R: torch.Tensor,
    known: KnownPositives,
    scale: torch.Tensor,
    limits: Limits,
    hardness: float,
    wire_dtype: torch.dtype,
) -> Outcome:
    """The outcome with the negatives that groups left out although their pair is not known.

    With positive's score s: log(exp(loss) + Σ exp(score − s)) over them, weighted by hardness. All ranks call
    this together.

    Args:
        outcome: without any other document of a query's group.
        group_R: of the documents, the first Q of which are the queries' positives.
        wire_dtype: what documents are rounded to on their way to other ranks.
    """
    here_Q, here_R = known.in_incomplete(group_R[: len(queries)]), known.in_incomplete(group_R)
    document_CD = gather_rows(documents.vector_ND[here_R], wire_dtype)
    id_C, group_C = gather_rows(torch.stack([documents.id_N[here_R], group_R[here_R]], 1)).unbind(1)
    near, group_B = queries[here_Q], group_R[here_Q]
    score_BC = scale * (near.vector_ND @ document_CD.T)
    counts_BC = (group_B[:, None] == group_C) & ~known.are_known(near.id_N[:, None], id_C[None, :])
    guided_B = torch.zeros_like(outcome.guided_Q[here_Q])
    if documents.guide_NG is not None and near.guide_NG is not None and limits.guide_Q is not None:
        guide_CG = gather_rows(documents.guide_NG[here_R])
        guided_BC = counts_BC & (near.guide_NG @ guide_CG.T > limits.guide_Q[here_Q, None])
        guided_B += guided_BC.sum(1)
        counts_BC &= ~guided_BC
    if limits.score_Q is not None:
        counts_BC &= ~(score_BC > limits.score_Q[here_Q, None])
    above_BC = score_BC - positive_scores(near, documents[here_Q], scale, wire_dtype)[:, None]
    above_BC = above_BC.masked_fill(~counts_BC, float("-inf"))
    weighted_BC = above_BC + hardness * (near.vector_ND @ document_CD.T).detach()
    loss_Q, hit_Q, guided_Q = outcome
    loss_B = torch.cat([loss_Q[here_Q, None], weighted_BC], 1).logsumexp(1)
    hit_B = hit_Q[here_Q] & (above_BC < 0).all(1)
    return Outcome(
        loss_Q.index_copy(0, here_Q, loss_B),
        hit_Q.index_copy(0, here_Q, hit_B),
        guided_Q.index_add(0, here_Q, guided_B),
    )


def _groups(query: np.ndarray, positive: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least id of a positive that each query, and each positive, is connected with."""
    of_positive, before = ids.copy(), None
    while before is None or not np.array_equal(of_positive, before):
        before = of_positive.copy()
        of_query = np.full(query.max(initial=-1) + 1, np.iinfo(np.int64).max)
        np.minimum.at(of_query, query, of_positive[positive])
        np.minimum.at(of_positive, positive, of_query[query])
    return of_query, of_positive


def _labels(sorted_ids: np.ndarray, label_of_id: np.ndarray, text_id: torch.Tensor) -> torch.Tensor:
    """The label of each text; its own id where it has none."""
    ids = text_id.cpu().numpy()
    place, known = _places(sorted_ids, ids)
    return torch.from_numpy(np.where(known, label_of_id[place], ids)).to(text_id.device)


def _counts(groups: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many members the group has whose number is each of the sorted ids."""
    return np.bincount(np.searchsorted(ids, groups), minlength=len(ids))


def _places(sorted_ids: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each id stands in the sorted ones, and whether it does (else some place)."""
    if not len(sorted_ids):
        return np.zeros(ids.shape, dtype=np.int64), np.zeros(ids.shape, dtype=bool)
    place = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return place, sorted_ids[place] == ids
