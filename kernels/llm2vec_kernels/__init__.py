"""Attention and contrastive kernels for packed, non-causal text encoders. Needs torch, on GPUs triton.

- `attention`: variable-length attention over a packed stream of texts, by one of several backends.
- `info_nce`: the contrastive loss and its gradient, a tile of scores at a time.
- `row_ops`: RMSNorm, rotary embedding and gated units, one operation each, on a CPU and in Triton.
- `products`: matrix products on a CPU by the faster of two libraries.

`reference.py` of a folder is its kernel in plain PyTorch, slow and obvious: the specification.
"""
