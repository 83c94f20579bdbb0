"""Which trunks cannot be recorded, and why."""

from __future__ import annotations

from typing import Any

from llm2vec_kernels.attention.api import choose_attention_backend
from llm2vec_kernels.attention.backends import AttentionNeeds
from llm2vec_kernels.attention.options import AttentionOptions
from peft.tuners.lora import LoraLayer

from llm2vec_ds.model.attention import NAME
from llm2vec_ds.model.bidirectional import is_causal
from llm2vec_ds.model.loading import head_dim_of
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.model.probe.small_config import EXPERTS
from llm2vec_ds.model.recomputation import runs_layers_twice
from llm2vec_ds.model.rope import RopeByText

BUSY_FROM = 2e13
"""Weights × tokens of a micro-batch. 1.3 billion weights and 16,384 tokens are 1.3e14 operations, 0.3 s of an
H100: about what Python takes to launch them."""


def is_busy(n_weights: int, n_tokens: int) -> bool:
    """Does a GPU compute a micro-batch for longer than Python launches it? Then filler only costs."""
    return n_weights * n_tokens >= BUSY_FROM


def cannot_be_recorded(trunk: Any) -> str | None:
    """Why a recording of the trunk would not hold for other texts, in words for a log; None: it may.

    What is not seen here shows when it is recorded: CUDA refuses what waits for the device.
    """
    if runs_layers_twice(trunk):
        return (
            "activation checkpointing runs whole layers twice with torch's generator set back, which no "
            "recording can do (model.activation_checkpointing: none does not)"
        )
    if any(isinstance(part, RopeByText) for part in trunk.modules()):
        return "its RoPE depends on the lengths of the texts"
    config = trunk.config.get_text_config()
    if any(EXPERTS.search(key) and isinstance(n, int) and n > 1 for key, n in config.to_dict().items()):
        return "its experts take tokens in groups whose sizes differ"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "its chunked attention cuts texts on the host"
    adapted = [layer for layer in trunk.modules() if isinstance(layer, LoraLayer)]
    if not all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in adapted):
        return "its adapters are not plain LoRA, and draw their dropout in another way"
    backend = _attention_backend(trunk)
    if backend != "triton":
        return f"attention {backend!r} depends on the number of texts, and only Triton's does not"
    return None


def _attention_backend(trunk: Any) -> str:
    config = trunk.config.get_text_config()
    asked = config._attn_implementation.removeprefix(NAME).removeprefix("_") or "auto"
    weight = next(trunk.parameters())
    softcap = getattr(config, "attn_logit_softcapping", None)
    options = AttentionOptions(1.0, softcap=softcap, causal=bool(is_causal(config)))
    needs = AttentionNeeds(weight.device, trunk.dtype, head_dim_of(config), options=options)
    return choose_attention_backend(asked, needs).name
