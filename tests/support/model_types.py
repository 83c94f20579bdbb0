"""Every supported model type, tiny and random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm2vec_ds.model.attention import register
from llm2vec_ds.model.bidirectional import with_causal

ATTENTION = register()

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WINDOWED = {"sliding_window": 4}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOWED}

TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOWED,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, **ALTERNATING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **ALTERNATING},
    "phi3": WINDOWED,
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWED},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": WINDOWED,
    "cohere": {},
    "cohere2": ALTERNATING,
    "glm4": {},
    "ministral": ALTERNATING,
    "exaone4": ALTERNATING,
    "helium": {},
    "seed_oss": {},
}


def build(model_type: str, attention: str = ATTENTION, causal: bool = False) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **TYPES[model_type]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(with_causal(config, causal), attn_implementation=attention).eval()
