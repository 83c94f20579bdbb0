"""What a recorded pass reads: tensors of fixed size and place, into which each micro-batch is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llm2vec_ds.batch import PackedBatch


@dataclass(frozen=True)
class StaticInputs:
    """A stream of L tokens: the texts of a micro-batch, then filler.

    Each filler token is a text by itself, so that no text sees one, and it costs no square of anything. It is
    a token of the batch, so that nothing but finite numbers comes of it.

    Attributes:
        batch: `input_ids` and `position_ids` `[L]`; `cu_seqlens` `[L + 1]`: at most every token is a text,
            and what is left over at the end are texts without tokens.
        seed: of dropout, an int64 scalar.
    """

    batch: PackedBatch
    seed: torch.Tensor
    _count: torch.Tensor

    @classmethod
    def empty(cls, length: int, longest_text: int, device: torch.device) -> StaticInputs:
        """Args: longest_text: a bound on the texts to come, in tokens; it chooses kernels."""

        def zeros(n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        with torch.inference_mode(False):  # whose tensors could be written under it alone
            count = torch.arange(length + 1, dtype=torch.int32, device=device)
            mask = zeros(length).bool()
            batch = PackedBatch(zeros(length), zeros(length), count.clone(), longest_text, mask)
            return cls(batch, torch.zeros((), dtype=torch.int64, device=device), count)

    def fill(self, batch: PackedBatch, seed: int) -> None:
        """Writes a batch of at most L tokens. Nothing waits for the device."""
        n, own = batch.n_tokens, self.batch
        own.input_ids[:n].copy_(batch.input_ids, non_blocking=True)
        own.input_ids[n:].copy_(batch.input_ids[:1].expand(own.n_tokens - n))
        own.position_ids[:n].copy_(batch.position_ids, non_blocking=True)
        own.position_ids[n:].zero_()
        n_bounds = len(batch.cu_seqlens)
        own.cu_seqlens[:n_bounds].copy_(batch.cu_seqlens, non_blocking=True)
        torch.clamp(
            self._count[: len(self._count) - n_bounds] + (n + 1),
            max=own.n_tokens,
            out=own.cu_seqlens[n_bounds:],
        )
        self.seed.fill_(seed)

    def fresh_bounds(self) -> PackedBatch:
        """The batch with its `cu_seqlens` copied: what layers share and follows from them is made again in
        each recorded pass, and by it."""
        with torch.inference_mode(False), torch.no_grad():  # layers share nothing of an inference tensor
            return replace(self.batch, cu_seqlens=self.batch.cu_seqlens.clone())
