"""More negatives from the same side: a query against other queries, and its positive against other documents.

With s(a, b) = scale · cos(a, b) the loss of query i becomes

    log( Σ_d exp s(q_i, d) + Σ_j exp s(q_i, q_j) + Σ_d exp s(p_i, d) ) − s(q_i, p_i)

(Li et al., 2023, arXiv 2308.03281; Solatorio, 2024, arXiv 2402.16829). The second and third sum leave out all
texts that known pairs connect with the query (`known_positives.ConnectedTexts`). The query itself and its
positive are among them. The query's `Limits` apply to all three sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm2vec_ds.objectives.contrastive.candidates import Candidates, Rows
from llm2vec_ds.objectives.contrastive.known_positives import ConnectedTexts
from llm2vec_ds.objectives.contrastive.texts import Limits, Texts


class SameSide(NamedTuple):
    """The further sums of the loss.

    Attributes:
        lse_Qs: log Σ exp s of each sum, `[Q]`; −inf where no text counts.
        guided_Q: how many texts the guide leaves out of the sums.
    """

    lse_Qs: list[torch.Tensor]
    guided_Q: torch.Tensor

    def added_to(self, loss_Q: torch.Tensor, positive_score_Q: torch.Tensor) -> torch.Tensor:
        """Adds these negatives to the loss. A sum of −inf adds neither loss nor gradient."""
        further = [lse_Q - positive_score_Q for lse_Q in self.lse_Qs]
        return torch.stack([loss_Q, *further]).logsumexp(0)


def same_side(
    sides: list[tuple[Texts, Candidates]],
    connected: ConnectedTexts,
    limits: Limits,
    scale: torch.Tensor,
) -> SameSide:
    """Returns one sum for each of `sides`. All ranks call this together.

    Args:
        sides: the rows, one for each query, and the candidates they are compared with.
        limits: the queries' limits, which apply to every sum.
    """
    found = []
    for texts, candidates in sides:
        labels = connected.labels(texts.id_N), connected.labels(candidates.own.id_N)
        found.append(candidates.log_sum_exp(Rows(texts, *labels, limits), scale))
    return SameSide([each.lse_Q for each in found], torch.stack([each.guided_Q for each in found]).sum(0))
