"""Texts of one side as further negatives: other queries of a query, and other documents of its positive.

With s(a, b) = scale · cos(a, b) the loss of query i becomes

    log( Σ_d exp s(q_i, d) + Σ_j exp s(q_i, q_j) + Σ_d exp s(p_i, d) ) − s(q_i, p_i)

(Li et al., 2023, arXiv 2308.03281; Solatorio, 2024, arXiv 2402.16829). The second and third sum leave out all
texts that known pairs connect with the query (`known_positives.ConnectedTexts`), its own and its positive
among them, and what `Limits` of the query say, as in the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm2vec_ds.objectives.contrastive.candidates import Candidates, Rows
from llm2vec_ds.objectives.contrastive.known_positives import ConnectedTexts
from llm2vec_ds.objectives.contrastive.texts import Limits, Texts


class SameSide(NamedTuple):
    """`lse_Qs`: log Σ exp s of each further sum, `[Q]`, −inf where nothing counts; `guided_Q`: how many texts
    the guide leaves out of them."""

    lse_Qs: list[torch.Tensor]
    guided_Q: torch.Tensor

    def added_to(self, loss_Q: torch.Tensor, positive_score_Q: torch.Tensor) -> torch.Tensor:
        """The loss with these negatives, from the one without. A sum of −inf has no gradient."""
        further = [lse_Q - positive_score_Q for lse_Q in self.lse_Qs]
        return torch.stack([loss_Q, *further]).logsumexp(0)


def same_side(
    sides: list[tuple[Texts, Candidates]],
    connected: ConnectedTexts,
    limits: Limits,
    scale: torch.Tensor,
) -> SameSide:
    """One sum for each of `sides`. All ranks call this together.

    Args:
        sides: rows, one for each query, and what they are compared with.
        limits: of the queries, in all sums.
    """
    found = []
    for texts, candidates in sides:
        labels = connected.labels(texts.id_N), connected.labels(candidates.own.id_N)
        found.append(candidates.log_sum_exp(Rows(texts, *labels, limits), scale))
    return SameSide([each.lse_Q for each in found], torch.stack([each.guided_Q for each in found]).sum(0))
