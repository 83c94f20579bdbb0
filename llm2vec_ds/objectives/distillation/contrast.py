"""SimCSE as a second loss in distillation: each text runs twice, with different dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors
from llm2vec_ds.recipe.objectives import DistilConfig, SimcseConfig


class Contrast:
    """InfoNCE between the two copies of each text (Gao et al., 2021, arXiv 2104.08821).

    Attributes:
        weight: factor on the loss. 0 turns it off.
        n_copies: how often each text goes through the encoder.
    """

    def __init__(self, config: DistilConfig) -> None:
        self.weight = config.simcse_weight
        self.n_copies = 2 if self.weight else 1
        self._scale = config.simcse_scale
        self._loss = ContrastiveLoss(SimcseConfig(scale=self._scale))

    def __call__(self, copies: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Returns this rank's share of the loss, without the weight; 0 if there is only one copy.

        The shares of all ranks add up to the loss.

        Args:
            copies: vectors of each copy, `[texts, D]`.
            ids: int64 `[texts]`. Equal texts have equal ids on every rank.
        """
        if len(copies) == 1:
            return copies[0].new_zeros((), dtype=torch.float32)
        first, second = copies
        ids = ids.to(first.device)
        vectors = PairVectors(first, second, second[:0], ids, ids, ids[:0])
        return self._loss(vectors, torch.tensor(self._scale, device=first.device)).share
