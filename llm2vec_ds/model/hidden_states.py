"""A packed batch through a trunk."""

from __future__ import annotations

from typing import Any

import torch

from llm2vec_ds.batch import PackedBatch


def trunk_hidden_states(trunk: Any, batch: PackedBatch) -> torch.Tensor:
    """Last hidden state of every token of a packed batch, `[T, D]`."""
    output = trunk(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden
