"""Finds the documents of a global batch that are right for each query, besides its own positive.

A pair (q, p) is known if any row of any rank has the query q and the positive p, compared by text. Then p is
no negative for q: neither as the positive of another row, nor as a hard negative.

The kernel can leave out the documents of one id for each query. So queries and positives that known pairs
connect form a group, and the group's number is that id. In most groups every pair is known: one query with
several positives, or one positive of several queries. A group with an unknown pair is incomplete. There the
id leaves out too much, and `with_pairs_not_known` adds the missing negatives. Nothing is ever subtracted from
a sum, so no digits cancel.

Shape legend: Q this rank's queries, R its documents, D width. In incomplete groups: B this rank's queries,
C the documents of all ranks.
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
        pairs: `i · len(positives) + j` for each known pair of `queries[i]` and `positives[j]`, sorted.
        group_of_positive: the group of each of `positives`: the smallest id among the group's positives.
        incomplete: groups in which some pair is not known, sorted.
    """

    queries: np.ndarray
    positives: np.ndarray
    pairs: np.ndarray
    group_of_positive: np.ndarray
    incomplete: np.ndarray

    @classmethod
    def of(cls, query_id_Q: torch.Tensor, positive_id_Q: torch.Tensor) -> KnownPositives:
        """Finds the known pairs in the rows of all ranks. All ranks call this together."""
        rows = gather_rows(torch.stack([query_id_Q, positive_id_Q], 1)).cpu().numpy()
        queries, query = np.unique(rows[:, 0], return_inverse=True)
        positives, positive = np.unique(rows[:, 1], return_inverse=True)
        pairs = np.unique(query * len(positives) + positive)
        query, positive = np.divmod(pairs, len(positives))
        group_of_query, group_of_positive = _groups(query, positive, positives)
        # A group of a queries and b positives is complete if it has a · b known pairs.
        wanted = _counts(group_of_query, positives) * _counts(group_of_positive, positives)
        incomplete = positives[_counts(group_of_query[query], positives) < wanted]
        return cls(queries, positives, pairs, group_of_positive, incomplete)

    def groups(self, text_id: torch.Tensor) -> torch.Tensor:
        """Returns the group of each text that is a positive of any row, and the own id of any other text."""
        return _labels(self.positives, self.group_of_positive, text_id)

    def in_incomplete(self, group_N: torch.Tensor) -> torch.Tensor:
        """Returns the places `[C]` in `group_N` whose group is incomplete."""
        _, found = _places(self.incomplete, group_N.cpu().numpy())
        return torch.from_numpy(np.flatnonzero(found)).to(group_N.device)

    def are_known(self, query_id: torch.Tensor, positive_id: torch.Tensor) -> torch.Tensor:
        """Returns which pairs are known, bool, in the shape that both ids broadcast to."""
        query, of_query = _places(self.queries, query_id.cpu().numpy())
        positive, of_positive = _places(self.positives, positive_id.cpu().numpy())
        _, paired = _places(self.pairs, query * len(self.positives) + positive)
        return torch.from_numpy(of_query & of_positive & paired).to(query_id.device)


@dataclass(frozen=True)
class ConnectedTexts:
    """Texts that known pairs connect, directly or through other texts, as query or as positive.

    Attributes:
        texts: ids of all queries and positives, sorted.
        label_of_text: the smallest id among the texts that each text is connected with.
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
        """Returns equal labels for connected texts. A text in no pair gets its own id."""
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
    """Adds the negatives that the groups left out although their pair is not known.

    The new loss is log(exp(loss) + Σ exp(score − s)). The sum runs over these negatives, weighted by
    hardness, and s is the positive's score. All ranks call this together.

    Args:
        outcome: the outcome so far. It leaves out all other documents of a query's group.
        group_R: the documents' groups. The first Q documents are the queries' positives.
        wire_dtype: documents are rounded to this dtype for other ranks.
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
    """Returns the group of each query and of each positive: the smallest id of a connected positive.

    Each round spreads the smallest id from positives to queries and back, until nothing changes.
    """
    of_positive, before = ids.copy(), None
    while before is None or not np.array_equal(of_positive, before):
        before = of_positive.copy()
        of_query = np.full(query.max(initial=-1) + 1, np.iinfo(np.int64).max)
        np.minimum.at(of_query, query, of_positive[positive])
        np.minimum.at(of_positive, positive, of_query[query])
    return of_query, of_positive


def _labels(sorted_ids: np.ndarray, label_of_id: np.ndarray, text_id: torch.Tensor) -> torch.Tensor:
    """Returns the label of each text, or its own id if it has none."""
    ids = text_id.cpu().numpy()
    place, known = _places(sorted_ids, ids)
    return torch.from_numpy(np.where(known, label_of_id[place], ids)).to(text_id.device)


def _counts(groups: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Counts the members of each group. The groups are numbered by `ids`, which are sorted."""
    return np.bincount(np.searchsorted(ids, groups), minlength=len(ids))


def _places(sorted_ids: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each id's place in `sorted_ids`, and whether it is there. If not, the place means nothing."""
    if not len(sorted_ids):
        return np.zeros(ids.shape, dtype=np.int64), np.zeros(ids.shape, dtype=bool)
    place = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return place, sorted_ids[place] == ids
