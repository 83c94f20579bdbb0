"""InfoNCE of queries against their own hard negatives only, for sources without in-batch negatives.

If positives are labels, classes or clusters, many texts of a batch may be right for a query. Such a query is
compared with the texts of its own row only, so ranks exchange nothing.

Shape legend: O queries, M their negatives, K the most that one query has.
"""

from __future__ import annotations

import torch

from llm2vec_ds.objectives.contrastive.known_positives import KnownPositives
from llm2vec_ds.objectives.contrastive.texts import Limits, Outcome, Texts


def against_own_negatives(
    queries: Texts,
    positives: Texts,
    negatives: Texts,
    query_of_M: torch.Tensor,
    known: KnownPositives,
    scale: torch.Tensor,
    limits: Limits,
    hardness: float,
) -> Outcome:
    """Returns the loss log Σ exp(score − positive's score), over a query's positive and its own negatives.

    Hardness weights the negatives. False negatives do not count.

    Args:
        positives: one for each query.
        query_of_M: int64, the query that each negative came with, in ascending order.
    """
    of_M = queries[query_of_M]
    positive_O = scale * (queries.vector_ND * positives.vector_ND).sum(-1)
    score_M = scale * (of_M.vector_ND * negatives.vector_ND).sum(-1)
    counts_M = ~known.are_known(of_M.id_N, negatives.id_N)
    guided_M = torch.zeros_like(counts_M)
    if of_M.guide_NG is not None and negatives.guide_NG is not None and limits.guide_Q is not None:
        near_M = (of_M.guide_NG * negatives.guide_NG).sum(-1) > limits.guide_Q[query_of_M]
        guided_M = counts_M & near_M
        counts_M = counts_M & ~near_M
    if limits.score_Q is not None:
        counts_M = counts_M & ~(score_M.detach() > limits.score_Q[query_of_M])
    # Each query's negatives become one row of a table [O, K], padded with −inf.
    n_of_O = torch.bincount(query_of_M, minlength=len(queries))
    slot_M = torch.arange(len(negatives), device=query_of_M.device) - (n_of_O.cumsum(0) - n_of_O)[query_of_M]
    above_M = (score_M - positive_O[query_of_M]).masked_fill(~counts_M, float("-inf"))
    n_most = int(n_of_O.max()) if len(negatives) else 0
    above_OK = score_M.new_full((len(queries), n_most), float("-inf")).index_put(
        (query_of_M, slot_M), above_M
    )
    weight_M = hardness * (of_M.vector_ND * negatives.vector_ND).sum(-1).detach()
    weight_OK = torch.zeros_like(above_OK.detach()).index_put((query_of_M, slot_M), weight_M)
    loss_O = torch.cat([torch.zeros_like(positive_O)[:, None], above_OK + weight_OK], 1).logsumexp(1)
    guided_O = torch.zeros_like(positive_O.detach()).index_add(0, query_of_M, guided_M.to(positive_O.dtype))
    return Outcome(loss_O, (above_OK < 0).all(1), guided_O)
