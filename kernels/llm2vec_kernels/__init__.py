"""Attention and contrastive kernels for packed, non-causal text encoders. Needs torch only.

- `dispatch.attention`: variable-length attention over a packed stream of texts.
- `info_nce`: the contrastive loss and its gradient, a tile of scores at a time.
- `reference`: each kernel in plain PyTorch, slow and obvious: the specification the others meet.
"""

from llm2vec_kernels.dispatch import AttentionBackend, attention, choose_attention_backend

__all__ = ["AttentionBackend", "attention", "choose_attention_backend"]
