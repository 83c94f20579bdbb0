"""The inputs of a recorded pass: tensors of fixed size and address. Each micro-batch is written into them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llm2vec_ds.batch import PackedBatch


@dataclass(frozen=True)
class StaticInputs:
    """A stream of L tokens: the texts of a micro-batch, then filler.

    Each filler token is a text by itself. So no real text attends to filler, and attention over filler costs
    next to nothing. Filler repeats the batch's first token, so its numbers are finite if the batch's are.

    Attributes:
        batch: `input_ids` and `position_ids` `[L]`, and `cu_seqlens` `[L + 1]`. There are at most L texts,
            one for each token. Unused bounds at the end stand for empty texts.
        seed: the seed of dropout, an int64 scalar.
    """

    batch: PackedBatch
    seed: torch.Tensor
    _count: torch.Tensor

    @classmethod
    def empty(cls, length: int, longest_text: int, device: torch.device) -> StaticInputs:
        """Makes inputs that hold no batch yet.

        Args:
            length: tokens of the stream, L.
            longest_text: no text will have more tokens. Attention chooses its kernels by this number.
        """

        def zeros(n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        # A tensor made under inference mode could not be written outside of it.
        with torch.inference_mode(False):
            count = torch.arange(length + 1, dtype=torch.int32, device=device)
            mask = zeros(length).bool()
            batch = PackedBatch(zeros(length), zeros(length), count.clone(), longest_text, mask)
            return cls(batch, torch.zeros((), dtype=torch.int64, device=device), count)

    def fill(self, batch: PackedBatch, seed: int) -> None:
        """Writes a batch of at most L tokens. Does not wait for the device."""
        n, own = batch.n_tokens, self.batch
        own.input_ids[:n].copy_(batch.input_ids, non_blocking=True)
        own.input_ids[n:].copy_(batch.input_ids[:1].expand(own.n_tokens - n))
        own.position_ids[:n].copy_(batch.position_ids, non_blocking=True)
        own.position_ids[n:].zero_()
        n_bounds = len(batch.cu_seqlens)
        own.cu_seqlens[:n_bounds].copy_(batch.cu_seqlens, non_blocking=True)
        # The bounds after the batch: one text for each filler token, then empty texts at the end.
        torch.clamp(
            self._count[: len(self._count) - n_bounds] + (n + 1),
            max=own.n_tokens,
            out=own.cu_seqlens[n_bounds:],
        )
        self.seed.fill_(seed)

    def fresh_bounds(self) -> PackedBatch:
        """Returns the batch with a copy of `cu_seqlens`.

        Layers share values that follow from `cu_seqlens`, and keep them with that tensor. A fresh copy has
        none, so the recording itself computes them, and each replay computes them for its own batch.
        """
        # Layers share nothing that follows from a tensor of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return replace(self.batch, cu_seqlens=self.batch.cu_seqlens.clone())
