"""The computation in an ONNX file: a stock trunk over padded texts, pooling, and scaling to length 1.

Shape legend: B texts, T tokens of the longest text, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

INPUTS = ["input_ids", "attention_mask"]
POOLINGS_OF_GRAPH = ("mean", "weighted_mean", "last", "eos", "bos")
"""Poolings that `Pooled.weights` computes."""
OUTPUTS = ["last_hidden_state", "sentence_embedding"]


@dataclass(frozen=True)
class Pooled:
    """The tokens that make a vector: all except the first `n_before` and the last `n_after` of each text."""

    pooling: str
    n_before: int
    n_after: int

    def weights(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """Returns each token's weight in its text's vector, `[B, T]` int64.

        The mask is 1 at tokens and 0 at padding. Places decide, not token ids. So a text may contain the
        names of special tokens.
        """
        place_BT = mask_BT.cumsum(1) - 1
        length_B1 = mask_BT.sum(1, keepdim=True)
        if self.pooling == "bos":
            return mask_BT * (place_BT == 0)
        if self.pooling in ("eos", "last"):
            return mask_BT * (place_BT == length_B1 - 1)
        text_BT = mask_BT * (place_BT >= self.n_before) * (place_BT < length_B1 - self.n_after)
        return text_BT * (place_BT - self.n_before + 1) if self.pooling == "weighted_mean" else text_BT


class Graph(torch.nn.Module):
    """Trunk and pooling. The trunk comes from stock transformers, and its config makes it bidirectional."""

    def __init__(self, trunk: Any, pooled: Pooled) -> None:
        super().__init__()
        self.trunk, self.pooled = trunk, pooled

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token vectors `[B, T, D]` and the texts' vectors `[B, D]` of length 1, both fp32.

        A text without a pooled token gets a vector of zeros.
        """
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden_BTD = output.last_hidden_state.float()
        weight_BT1 = self.pooled.weights(attention_mask)[..., None].float()
        sum_BD = (hidden_BTD * weight_BT1).sum(1)
        return hidden_BTD, torch.nn.functional.normalize(sum_BD, dim=-1)
