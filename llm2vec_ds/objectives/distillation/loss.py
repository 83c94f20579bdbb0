"""The distillation loss: each text's vector, and its cosines with other texts, against the teacher's.

Shape legend: Q this rank's texts, N all ranks', D the student's width, T the teacher's.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F

from llm2vec_ds.distributed import all_gather_counts, gather_rows, rank
from llm2vec_ds.objectives.similarities import TaughtVectors, similarity_loss
from llm2vec_ds.recipe.objectives import DistilConfig

Number = TypeVar("Number", float, torch.Tensor)


class DistillationLoss:
    """w_v · mean_i v(W s_i, t_i) + w_s · mean_i r(row i of the student's cosines, of the teacher's).

    v is 1 − cosine or the mean squared difference. r is `similarity_loss` of text i with all texts j ≠ i of
    the global batch. The means run over all ranks' texts, so neither value nor gradient depends on how ranks
    share the batch.
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
        """Returns this rank's shares of both losses, `[2]`, without weights. A loss of weight 0 gives 0.

        The shares of all ranks add up to the losses.

        Args:
            mapped_QT: the student's vectors in the teacher's space.
            n_global: the number of texts of all ranks.
        """
        none = student_QD.new_zeros((), dtype=torch.float32)
        vector = self._vectors(mapped_QT, teacher_QT).sum() if self.config.vector_weight else none
        similar = self._similarities(student_QD, teacher_QT).sum() if self.config.similarity_weight else none
        return torch.stack([vector, similar]) / n_global

    def weighted(self, vector: Number, similarity: Number) -> Number:
        """Returns the weighted sum of both losses."""
        return vector * self.config.vector_weight + similarity * self.config.similarity_weight

    def _vectors(self, mapped_QT: torch.Tensor, teacher_QT: torch.Tensor) -> torch.Tensor:
        if self.config.vector_loss == "mse":
            return (mapped_QT.float() - teacher_QT).square().mean(-1)
        return 1 - F.cosine_similarity(mapped_QT.float(), teacher_QT, dim=-1)

    def _similarities(self, student_QD: torch.Tensor, teacher_QT: torch.Tensor) -> torch.Tensor:
        student_QD, teacher_QT = (F.normalize(x.float(), dim=-1) for x in (student_QD, teacher_QT))
        counts = all_gather_counts(len(student_QD), student_QD.device)
        place_N = torch.arange(sum(counts), device=student_QD.device)
        own_Q = place_N[sum(counts[: rank()]) :][: len(student_QD)]
        rows = TaughtVectors(student_QD, teacher_QT, own_Q)
        columns = TaughtVectors(gather_rows(student_QD), gather_rows(teacher_QT), place_N)
        return similarity_loss(rows, columns, self.config.similarity_loss, self.config.temperature)
