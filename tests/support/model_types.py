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
    "olmo3": ALTERNATING,
    "ministral3": WINDOWED,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gemma4_text": {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 400,
        "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
        "initializer_range": 0.02,  # its scores are not scaled down, and rounding grows with them
        **ALTERNATING,
    },
    "deepseek_v3": {
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [1.0 + i for i in range(48)],
}

CHANGED: dict[str, dict[str, Any]] = {
    # What the config of a type lacks before a checkpoint says it.
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 128},
    "hunyuan_v1_moe": {"rope_parameters": ROPE, "head_dim": 128},
    "ministral": {"rope_parameters": ROPE, "head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    # What its checkpoints have and its default has not.
    "gemma4_text": {"num_kv_shared_layers": 18},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "phi3": {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": LONGROPE,
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 28, "sliding_window": 4096},
}
"""Beside the defaults of its config class, for a config as checkpoints of the type have it."""


def config_of(model_type: str) -> Any:
    """A config of the size of a checkpoint."""
    return AutoConfig.for_model(model_type, **CHANGED.get(model_type, {}))


def build(model_type: str, attention: str = ATTENTION, causal: bool = False) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **TYPES[model_type]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(with_causal(config, causal), attn_implementation=attention).eval()
