"""`PackedBatch`: several texts in one stream without padding. `data/` makes it, `model/` reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NOT_PREDICTED = -100
"""Label of a token that the model does not predict."""


@dataclass(frozen=True)
class PackedBatch:
    """S texts, T tokens in all, one after the other.

    Attributes:
        input_ids: `[T]` int64.
        position_ids: `[T]` int64. They restart at 0 in each text.
        cu_seqlens: `[S+1]` int32, the start of each text. The last entry is T.
        max_seqlen: tokens of the longest text.
        pool_mask: `[T]` bool, the tokens that pooling uses (not the instruction).
        labels: `[T]` int64 for MNTP, with `NOT_PREDICTED` where there is nothing to predict. Else None.
        predicted: `[M]` int64, the tokens to predict, ascending. It is stored with the labels, because
            counting them on a GPU would wait for the GPU.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    pool_mask: torch.Tensor
    labels: torch.Tensor | None = None
    predicted: torch.Tensor | None = None

    @property
    def n_texts(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def ready_for(self, device: torch.device) -> PackedBatch:
        """Returns the same batch, in pinned memory for a GPU, so that `to(device)` copies without waiting."""
        return self._with_tensors(torch.Tensor.pin_memory) if device.type == "cuda" else self

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **changed)

    def segment_ids(self) -> torch.Tensor:
        """Returns the text that each token belongs to, `[T]` int64."""
        texts = torch.arange(self.n_texts, device=self.input_ids.device)
        return torch.repeat_interleave(texts, self.cu_seqlens.diff().long(), output_size=self.n_tokens)
