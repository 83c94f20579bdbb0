"""The machine's limit: its matrix-product peak, and the floating-point operations that a work needs."""

from __future__ import annotations

import time
from typing import Any

import torch
from llm2vec_kernels.products import product


def matmul_peak_gflop_per_s(threads: int, size: int = 2048, seconds: float = 2.0) -> float:
    """Returns the best speed of a square fp32 product within `seconds`, by the faster library."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def needed_gflop(work: str, config: dict[str, Any], n_tokens: int, n_masked: int = 0) -> float:
    """Counts matrix products of the real tokens, without attention scores, padding or recomputation.

    Forward takes two operations a weight and token; backward through frozen weights two more (no gradient of
    the weights). MNTP's frozen head on masked rows: the same two, or four.
    """
    d, inner, n_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or d // heads
    weights = n_layers * (2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + 3 * d * inner)
    passes = 1 if work == "encode" else 2
    head = config["vocab_size"] * d * n_masked
    return passes * 2 * (weights * n_tokens + head) / 1e9
