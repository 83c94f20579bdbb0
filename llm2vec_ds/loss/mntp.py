"""Masked next token prediction: the hidden state at i−1 predicts the masked token at i."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.masking import NOT_PREDICTED
from llm2vec_ds.encoder import Encoder


class MaskedTokenHead(nn.Module):
    """The language head on masked rows only, in chunks: logits of at most `chunk_tokens` rows are held.

    The weight is the model's own (frozen or tied as it comes) and belongs to this module directly, so
    that ZeRO-3 gathers it once a call however many chunks a rank has. Honours
    `final_logit_softcapping` (Gemma 2), `logits_scaling` (Granite, a divisor) and `logit_scale` (Cohere, a
    factor) of the config.
    """

    def __init__(self, head: nn.Linear, config: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        self.factor: float = (factor or 1.0) / (divisor or 1.0)
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden_MD: torch.Tensor, label_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy `[M]` fp32 and whether the likeliest token is the right one `[M]` bool."""
        losses, hits = [hidden_MD.new_zeros(0).float()], [label_M.new_zeros(0).bool()]
        for hidden, label in zip(
            hidden_MD.split(self.chunk_tokens), label_M.split(self.chunk_tokens), strict=True
        ):
            loss, hit = checkpoint(self._chunk, hidden, label, use_reentrant=False)
            losses.append(loss)
            hits.append(hit)
        return torch.cat(losses), torch.cat(hits)

    def _chunk(self, hidden: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, self.weight, self.bias).float() * self.factor
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits, label, reduction="none"), logits.detach().argmax(-1) == label


class MntpModel(nn.Module):
    """Encoder and head as one module, as the engine trains them."""

    def __init__(self, encoder: Encoder, head: MaskedTokenHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss `[M]`, hit `[M]` and text number `[M]` of the M masked tokens, in stream order.

        A text's first token carries no label, so i−1 is always in the same text.
        """
        if batch.labels is None:
            raise ValueError("MNTP needs a batch with labels")
        masked_M = (batch.labels != NOT_PREDICTED).nonzero().squeeze(1)
        hidden_TD = self.encoder.hidden_states(batch)
        loss_M, hit_M = self.head(hidden_TD[masked_M - 1], batch.labels[masked_M])
        return loss_M, hit_M, batch.segment_ids()[masked_M]
