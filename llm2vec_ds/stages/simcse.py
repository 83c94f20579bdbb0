"""The SimCSE stage: each text twice, with different dropout; the other texts are negatives."""

from __future__ import annotations

import numpy as np
import torch

from llm2vec_ds.config import SimcseConfig
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.distributed import all_reduce_sum, rank
from llm2vec_ds.encoder import Encoder
from llm2vec_ds.loss.contrastive import global_info_nce
from llm2vec_ds.loss.embedding_cache import vectors_loss_backward
from llm2vec_ds.stages.base import Backward, Forward, StepResult, dropout_seed, equal_count


class SimcseStage:
    """Loss: InfoNCE of a text's two vectors, averaged over the global batch."""

    def __init__(
        self,
        encoder: Encoder,
        texts: PreparedTexts,
        config: SimcseConfig,
        *,
        seed: int,
        max_tokens_per_micro_batch: int,
    ) -> None:
        self.model = encoder
        self.encoder = encoder
        self.texts = texts
        self.config = config
        self.seed = seed
        self.max_tokens = max_tokens_per_micro_batch

    def step(self, step: int, rows: np.ndarray, forward: Forward, backward: Backward) -> StepResult:
        device = self.encoder.device
        groups = [rows[g] for g in plan_micro_batches(2 * self.texts.lengths[rows], self.max_tokens)]
        texts = [self.texts[group] for group in groups]
        batches = [pack([t for t in group for _ in range(2)]).to(device) for group in texts]
        hash_Q = torch.tensor([text.text_hash for group in texts for text in group], device=device)
        n_passes = equal_count(groups, device)
        n_global = float(all_reduce_sum(torch.tensor(float(len(rows)), device=device)))

        def loss_share(vectors: torch.Tensor) -> torch.Tensor:
            losses = global_info_nce(vectors[0::2], vectors[1::2], hash_Q, scale=self.config.scale)
            return losses.sum() / n_global

        vectors, share = vectors_loss_backward(
            forward,
            batches,
            [dropout_seed(self.seed, step, rank(), index) for index in range(n_passes)],
            loss_share,
            lambda scalar, index, last: backward(scalar, rows=groups[index].tolist(), last=last),
            n_passes=n_passes,
        )
        order = np.concatenate(groups)
        finite = vectors.isfinite().all(-1).view(-1, 2).all(-1).cpu().numpy()
        return StepResult(
            loss=float(all_reduce_sum(share)),
            n_tokens=sum(batch.n_tokens for batch in batches),
            bad_rows=order[~finite].tolist(),
        )

    def held_out(self, forward: Forward) -> None:
        """SimCSE has no held-out loss: with dropout off, a text's two vectors are the same."""
        return None
