"""Finds the trunks that cannot be recorded, and says why."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer

from llm2vec_ds.model.attention import backend_of
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.model.probe.small_config import EXPERTS
from llm2vec_ds.model.recomputation import runs_layers_twice
from llm2vec_ds.model.rope import RopeByText

BUSY_FROM = 2e13
"""Limit of weights × tokens of a micro-batch. 1.3 billion weights and 16,384 tokens are 1.3e14 operations. An
H100 takes 0.3 s for these. Python takes about as long to launch them."""


def is_busy(n_weights: int, n_tokens: int) -> bool:
    """Says whether the GPU takes longer for a micro-batch than Python takes to launch it.

    Then a recording saves nothing, and its filler only costs time.
    """
    return n_weights * n_tokens >= BUSY_FROM


def cannot_be_recorded(trunk: Any) -> str | None:
    """Says why a recording of the trunk would be wrong for other texts, in words for a log.

    None: no reason is known. Others show during the recording, because CUDA refuses to record anything that
    waits for the device.
    """
    if runs_layers_twice(trunk):
        return (
            "activation checkpointing runs whole layers twice and resets torch's generator, which a "
            "recording cannot do (use model.activation_checkpointing: none)"
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
    backend = backend_of(trunk)
    if backend != "triton":
        return f"attention {backend!r} depends on the number of texts, and only Triton's does not"
    return None
