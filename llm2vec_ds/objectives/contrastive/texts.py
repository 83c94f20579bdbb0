"""Texts as the contrastive loss sees them, and the limits that tell a negative from a false negative.

Shape legend: N texts, Q queries, D width, G the guide's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm2vec_ds.recipe.objectives import ContrastiveConfig, SupervisedConfig

TIE = 1e-6
"""Two of a guide's cosines that differ by less count as equal: tiles round differently in fp32."""


@dataclass(frozen=True)
class Texts:
    """Vectors `[N, D]` of length 1, the ids of their texts (int64 `[N]`), and a guide's vectors `[N, G]` of
    length 1 of the same texts."""

    vector_ND: torch.Tensor
    id_N: torch.Tensor
    guide_NG: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.id_N)

    def __getitem__(self, places: slice | torch.Tensor) -> Texts:
        guide_NG = None if self.guide_NG is None else self.guide_NG[places]
        return Texts(self.vector_ND[places], self.id_N[places], guide_NG)

    def __add__(self, other: Texts) -> Texts:
        """Returns these texts, then `other`. Guide vectors must come from the same guide."""
        guide_NG = None
        if self.guide_NG is not None and other.guide_NG is not None:
            guide_NG = torch.cat([self.guide_NG, other.guide_NG])
        vector_ND = torch.cat([self.vector_ND, other.vector_ND])
        return Texts(vector_ND, torch.cat([self.id_N, other.id_N]), guide_NG)


def positive_scores(
    queries: Texts, positives: Texts, scale: torch.Tensor, wire_dtype: torch.dtype
) -> torch.Tensor:
    """Returns the score of each query with its positive, `[Q]`.

    The positive is rounded as if another rank had sent it. So its score equals the one in the sum over all
    documents. The gradient ignores the rounding.
    """
    own_QD = positives.vector_ND
    own_QD = own_QD + (own_QD.to(wire_dtype).to(own_QD) - own_QD).detach()
    return scale * (queries.vector_ND * own_QD).sum(-1)


class Outcome(NamedTuple):
    """Results for each query, `[Q]`.

    Attributes:
        loss_Q: the loss.
        hit_Q: whether the positive beats every other document that counts (bool).
        guided_Q: how many documents are no negatives only because of the guide (fp32).
    """

    loss_Q: torch.Tensor
    hit_Q: torch.Tensor
    guided_Q: torch.Tensor


@dataclass(frozen=True)
class Limits:
    """Upper limits for each query, `[Q]`. A document above a limit is no negative, because it may be right.

    `score_Q` limits the scaled score. `guide_Q` limits the guide's cosine (GISTEmbed: Solatorio, 2024, arXiv
    2402.16829). None means no limit.
    """

    score_Q: torch.Tensor | None
    guide_Q: torch.Tensor | None

    @classmethod
    def of(cls, queries: Texts, positives: Texts, scale: torch.Tensor, config: ContrastiveConfig) -> Limits:
        """Computes the limits from each query's score with its positive."""
        score_Q = guide_Q = None
        if config.false_negative_margin is not None:
            cosine_Q = (queries.vector_ND * positives.vector_ND).sum(-1).detach()
            score_Q = scale.detach() * (cosine_Q + config.false_negative_margin)
        if queries.guide_NG is not None and positives.guide_NG is not None:
            assert isinstance(config, SupervisedConfig)
            if not config.guide_filters:
                return cls(score_Q, None)
            cosine_Q = (queries.guide_NG * positives.guide_NG).sum(-1)
            lower_Q = (1 - config.guide_ratio) * cosine_Q.abs() + config.guide_margin
            guide_Q = cosine_Q - lower_Q - TIE
        return cls(score_Q, guide_Q)

    def __getitem__(self, places: torch.Tensor) -> Limits:
        return Limits(*(None if x is None else x[places] for x in (self.score_Q, self.guide_Q)))
