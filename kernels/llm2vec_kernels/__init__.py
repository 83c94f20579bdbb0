"""Kernels for packed, non-causal text encoders. They need torch, and Triton on a GPU.

- `attention`: variable-length attention over a packed stream of texts, by one of several backends.
- `info_nce`: the contrastive loss and its gradient, a tile of scores at a time.
- `row_ops`: RMSNorm, rotary embedding, gated units and dropout, on a CPU and in Triton.
- `products`: fp32 matrix products on a CPU, by the faster of two libraries.

A folder's `reference.py` is the specification of its kernels: the same in plain PyTorch, slow and obvious.
"""
