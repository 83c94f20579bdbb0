"""Runs a packed batch through a trunk."""

from __future__ import annotations

from typing import Any

import torch
from llm2vec_kernels.seeds import Seeds

from llm2vec_ds.batch import PackedBatch


def trunk_hidden_states(trunk: Any, batch: PackedBatch, seeds: Seeds | None = None) -> torch.Tensor:
    """Returns the last hidden state of every token of a packed batch, `[T, D]`.

    Args:
        seeds: dropout follows from these in place of torch's generator: that of adapters on any device, and
            that of attention in Triton. Not for a trunk that recomputes whole layers: the second run would
            get other seeds.
    """
    options = {} if seeds is None else {"dropout_seeds": seeds}
    output = trunk(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        **options,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def seeded_hidden_states(trunk: Any, batch: PackedBatch) -> torch.Tensor:
    """Returns the same, with dropout that follows from one seed. torch's generator draws the seed.

    A recorded pass draws its seed in the same way. So a run does not depend on recordings.
    """
    if not trunk.training:
        return trunk_hidden_states(trunk, batch)
    seeds = Seeds(torch.full((), drawn_dropout_seed(), dtype=torch.int64, device=batch.input_ids.device))
    return trunk_hidden_states(trunk, batch, seeds)


def drawn_dropout_seed() -> int:
    return int(torch.randint(2**62, ()))
