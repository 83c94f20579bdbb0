"""What a text's vector should have in common with the teacher's: the vector itself, and its cosines.

Shape legend: Q this rank's texts, N all ranks', D the student's width, T the teacher's.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from llm2vec_ds.distributed import all_gather_counts, gather_rows, rank
from llm2vec_ds.recipe.objectives import DistilConfig

Number = TypeVar("Number", float, torch.Tensor)

ROWS_PER_BLOCK = 1024
"""Rows of scores that are held at once; backward computes them again."""


class DistillationLoss:
    """w_v · mean_i v(W s_i, t_i) + w_s · mean_i r(row i of the student's cosines, of the teacher's).

    v is 1 − cosine or the mean squared difference. r compares the cosines of text i with all texts j ≠ i of
    the global batch: KL(softmax(teacher / τ) ‖ softmax(student / τ)) (cf. Fang et al., 2021, arXiv
    2101.04731), or the mean squared difference (cf. Tung and Mori, 2019, arXiv 1907.09682). The means run
    over all ranks' texts, so neither value nor gradient depends on how ranks share the batch.
    """

    def __init__(self, config: DistilConfig) -> None:
        self.config = config

    def __call__(
        self,
        student_QD: torch.Tensor,
        mapped_QT: torch.Tensor,
        teacher_QT: torch.Tensor,
        n_global: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's share of both losses (shares add up), `[2]`, without weights; 0 where the weight is.

        Args:
            mapped_QT: student's vectors in the teacher's space.
            n_global: texts of all ranks.
        """
        none = student_QD.new_zeros((), dtype=torch.float32)
        vector = self._vectors(mapped_QT, teacher_QT).sum() if self.config.vector_weight else none
        similar = self._similarities(student_QD, teacher_QT).sum() if self.config.similarity_weight else none
        return torch.stack([vector, similar]) / n_global

    def weighted(self, vector: Number, similarity: Number) -> Number:
        """The sum of both with their weights."""
        return vector * self.config.vector_weight + similarity * self.config.similarity_weight

    def _vectors(self, mapped_QT: torch.Tensor, teacher_QT: torch.Tensor) -> torch.Tensor:
        if self.config.vector_loss == "mse":
            return (mapped_QT.float() - teacher_QT).square().mean(-1)
        return 1 - F.cosine_similarity(mapped_QT.float(), teacher_QT, dim=-1)

    def _similarities(self, student_QD: torch.Tensor, teacher_QT: torch.Tensor) -> torch.Tensor:
        student_QD, teacher_QT = (F.normalize(x.float(), dim=-1) for x in (student_QD, teacher_QT))
        student_ND, teacher_NT = gather_rows(student_QD), gather_rows(teacher_QT)
        first = sum(all_gather_counts(len(student_QD), student_QD.device)[: rank()])
        own_Q = first + torch.arange(len(student_QD), device=student_QD.device)
        blocks = zip(
            student_QD.split(ROWS_PER_BLOCK),
            teacher_QT.split(ROWS_PER_BLOCK),
            own_Q.split(ROWS_PER_BLOCK),
            strict=True,
        )
        losses = [
            checkpoint(self._rows, *block, student_ND, teacher_NT, use_reentrant=False) for block in blocks
        ]
        return torch.cat(losses)

    def _rows(
        self,
        student_QD: torch.Tensor,
        teacher_QT: torch.Tensor,
        own_Q: torch.Tensor,
        student_ND: torch.Tensor,
        teacher_NT: torch.Tensor,
    ) -> torch.Tensor:
        """Loss `[Q]` of some rows of the scores; `own_Q`: each text's place among all, left out."""
        student_QN, teacher_QN = student_QD @ student_ND.T, teacher_QT @ teacher_NT.T
        is_own = own_Q[:, None] == torch.arange(len(student_ND), device=own_Q.device)
        if self.config.similarity_loss == "mse":
            difference = (student_QN - teacher_QN).masked_fill(is_own, 0.0)
            return difference.square().sum(-1) / (len(student_ND) - 1)
        wanted, found = (
            (scores / self.config.temperature).masked_fill(is_own, -torch.inf).log_softmax(-1)
            for scores in (teacher_QN, student_QN)
        )
        return (wanted.exp() * (wanted - found).masked_fill(is_own, 0.0)).sum(-1)
