"""Attention and contrastive kernels for packed, non-causal text encoders. Needs torch, on GPUs triton.

- `dispatch.attention`: variable-length attention over a packed stream of texts, by one of `backends`.
- `flash_attention`: the Triton backend, forward and backward.
- `info_nce`: the contrastive loss and its gradient, a tile of scores at a time.
- `row_ops`: RMSNorm, rotary embedding and gated units, one operation each, on a CPU and in Triton.
- `reference`: each kernel in plain PyTorch, slow and obvious: the specification the others meet.
"""

from llm2vec_kernels.backends import AttentionNeeds
from llm2vec_kernels.dispatch import (
    ATTENTION_NAMES,
    AttentionBackend,
    attention,
    choose_attention_backend,
)

__all__ = [
    "ATTENTION_NAMES",
    "AttentionBackend",
    "AttentionNeeds",
    "attention",
    "choose_attention_backend",
]
