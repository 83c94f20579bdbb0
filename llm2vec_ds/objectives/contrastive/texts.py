"""Texts as the contrastive loss sees them, and how near to a query a document may be as a negative.

Shape legend: N texts, Q queries, D width, G the guide's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm2vec_ds.recipe.objectives import ContrastiveConfig, SupervisedConfig

TIE = 1e-6
"""A guide's cosines nearer than this are equal in fp32, in whatever tile they are computed."""


@dataclass(frozen=True)
class Texts:
    """Vectors `[N, D]` of length 1, the ids of their texts, int64 `[N]`, and a guide's vectors of them, `[N,
    G]` of length 1."""

    vector_ND: torch.Tensor
    id_N: torch.Tensor
    guide_NG: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.id_N)

    def __getitem__(self, places: slice | torch.Tensor) -> Texts:
        guide_NG = None if self.guide_NG is None else self.guide_NG[places]
        return Texts(self.vector_ND[places], self.id_N[places], guide_NG)

    def __add__(self, other: Texts) -> Texts:
        """Both, one after the other; of one guide."""
        guide_NG = None
        if self.guide_NG is not None and other.guide_NG is not None:
            guide_NG = torch.cat([self.guide_NG, other.guide_NG])
        vector_ND = torch.cat([self.vector_ND, other.vector_ND])
        return Texts(vector_ND, torch.cat([self.id_N, other.id_N]), guide_NG)


def positive_scores(
    queries: Texts, positives: Texts, scale: torch.Tensor, wire_dtype: torch.dtype
) -> torch.Tensor:
    """Score of each query and its positive, `[Q]`, which is rounded as on its way to other ranks."""
    own_QD = positives.vector_ND
    own_QD = own_QD + (own_QD.to(wire_dtype).to(own_QD) - own_QD).detach()
    return scale * (queries.vector_ND * own_QD).sum(-1)


class Outcome(NamedTuple):
    """Of each query, `[Q]`: the loss; whether the positive beats every negative (bool); how many documents
    the guide leaves out that would be negatives without it (fp32)."""

    loss_Q: torch.Tensor
    hit_Q: torch.Tensor
    guided_Q: torch.Tensor


@dataclass(frozen=True)
class Limits:
    """What a document may not be above as a negative of each query: of its scaled score, and of the guide's
    cosine (GISTEmbed: Solatorio, 2024, arXiv 2402.16829); `[Q]`, None: no limit."""

    score_Q: torch.Tensor | None
    guide_Q: torch.Tensor | None

    @classmethod
    def of(cls, queries: Texts, positives: Texts, scale: torch.Tensor, config: ContrastiveConfig) -> Limits:
        """From the positives of the queries, `[Q]`."""
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
