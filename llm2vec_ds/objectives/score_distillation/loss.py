"""A loss that pulls an encoder's scores of a query's documents towards a judge's.

Shape legend: Q this rank's queries, R its documents, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm2vec_ds.recipe.objectives import DistilScoresConfig


class ScoreLoss:
    """The loss of each query over its own documents: document 0 is the positive, the others are negatives.

    The student's score of document j is s_j = scale · cos(q, d_j). The judge's score is t_j.

    kl: KL(softmax_j(t_j / τ) ‖ softmax_j(s_j)) (listwise; cf. Hinton et al., 2015, arXiv 1503.02531);
    margin_mse: the mean over negatives of ((s_0 − s_j) − (t_0 − t_j))² (Hofstätter et al., 2020,
    arXiv 2010.02666, equation 8). A query without negatives has the loss 0.
    """

    def __init__(self, config: DistilScoresConfig) -> None:
        self.config = config

    def __call__(
        self,
        query_QD: torch.Tensor,
        document_RD: torch.Tensor,
        query_of_R: torch.Tensor,
        score_R: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the summed loss of this rank's queries, and how many have the judge's best document first.

        Args:
            document_RD: the first Q are the queries' positives, in the order of the queries.
            query_of_R: the query that each document belongs to.
            score_R: the judge's scores, fp32.
        """
        cosine_R = F.cosine_similarity(query_QD.float()[query_of_R], document_RD.float(), dim=-1)
        found_R, n_queries = self.config.scale * cosine_R, len(query_QD)
        hits = (_best(found_R, query_of_R, n_queries) == _best(score_R, query_of_R, n_queries)).sum()
        if self.config.loss == "margin_mse":
            query_M = query_of_R[n_queries:]
            wanted_M = score_R[query_M] - score_R[n_queries:]
            margin_M = found_R[query_M] - found_R[n_queries:]
            count_Q = torch.zeros_like(found_R[:n_queries]).index_add(0, query_M, torch.ones_like(margin_M))
            return ((margin_M - wanted_M).square() / count_Q[query_M]).sum(), hits
        wanted_R = _log_softmax(score_R / self.config.temperature, query_of_R, n_queries)
        return (wanted_R.exp() * (wanted_R - _log_softmax(found_R, query_of_R, n_queries))).sum(), hits


def _log_softmax(score_R: torch.Tensor, query_of_R: torch.Tensor, n_queries: int) -> torch.Tensor:
    """Returns the log-softmax of the scores, over the documents of each query."""
    start = torch.full((n_queries,), -torch.inf, device=score_R.device)
    largest_Q = start.scatter_reduce(0, query_of_R, score_R.detach(), "amax")
    shifted_R = score_R - largest_Q[query_of_R]
    sum_Q = torch.zeros_like(start).index_add(0, query_of_R, shifted_R.exp())
    return shifted_R - sum_Q.log()[query_of_R]


def _best(score_R: torch.Tensor, query_of_R: torch.Tensor, n_queries: int) -> torch.Tensor:
    """Returns the best document of each query: the first one with the highest score."""
    start = torch.full((n_queries,), -torch.inf, device=score_R.device)
    is_best = score_R.detach() == start.scatter_reduce(0, query_of_R, score_R.detach(), "amax")[query_of_R]
    place = torch.arange(len(score_R), device=score_R.device).masked_fill(~is_best, len(score_R))
    last = torch.full((n_queries,), len(score_R), device=score_R.device)
    return last.scatter_reduce(0, query_of_R, place, "amin")
