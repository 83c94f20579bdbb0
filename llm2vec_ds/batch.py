"""`PackedBatch`: several texts in one stream without padding. `data/` makes it, `model/` reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NOT_PREDICTED = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True)
class PackedBatch:
    """S texts, T tokens in all, one after the other.

    Attributes:
        input_ids: `[T]` int64.
        position_ids: `[T]` int64, restarting at 0 in each text.
        cu_seqlens: `[S+1]` int32, where each text starts, and T at the end.
        max_seqlen: the longest text, in tokens.
        pool_mask: `[T]` bool, tokens that count for the text's vector (not the instruction).
        labels: `[T]` int64 for MNTP, `NOT_PREDICTED` where nothing is to be predicted; else None.
        predicted: `[M]` int64, the tokens that are to be predicted, ascending. It comes with the labels: to
            count them on a GPU one has to wait for it.
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
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def ready_for(self, device: torch.device) -> PackedBatch:
        """The same batch in memory from which `to(device)` copies without waiting."""
        return self._with_tensors(torch.Tensor.pin_memory) if device.type == "cuda" else self

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **changed)

    def segment_ids(self) -> torch.Tensor:
        """`[T]` int64: which text each token belongs to."""
        texts = torch.arange(self.n_texts, device=self.input_ids.device)
        return torch.repeat_interleave(texts, self.cu_seqlens.diff().long(), output_size=self.n_tokens)
