"""Attention over a packed stream of texts. Most callers need only these names."""

from llm2vec_kernels.attention.api import (
    ATTENTION_NAMES,
    AttentionBackend,
    attention,
    choose_attention_backend,
)
from llm2vec_kernels.attention.backends import AttentionNeeds
from llm2vec_kernels.attention.options import AttentionOptions

__all__ = [
    "ATTENTION_NAMES",
    "AttentionBackend",
    "AttentionNeeds",
    "AttentionOptions",
    "attention",
    "choose_attention_backend",
]
