"""The trunk of a tiny Llama, with the package's attention."""

from __future__ import annotations

import torch

from llm2vec_ds.model.attention import register
from tests.support.tiny import tiny_llama

ATTENTION = register()


def trunk(causal: bool = False, attention: str = ATTENTION, **changes: object) -> torch.nn.Module:
    model = tiny_llama(**changes).model
    model.config.is_causal = causal
    model.set_attn_implementation(attention)
    return model.eval()
