"""Writes an encoder as one GGUF file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.gguf.architecture import (
    Architecture,
    architecture_of,
    head_dim,
    window_of,
    window_period,
)
from llm2vec_ds.export.gguf.rope import Rope, check_can_hold, check_is_plain, rope_of
from llm2vec_ds.export.gguf.rules import POOLING_TYPES, check_can_be_said, notes_of
from llm2vec_ds.export.gguf.tensors import Storage, Tensor, tensors_of, values_of
from llm2vec_ds.export.gguf.tokenizer import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Plan:
    """Everything that the file will say. It is known before anything is written.

    Attributes:
        local_rope, period: RoPE of the layers with a sliding window, and the period of full layers. Only set
            if llama.cpp applies the window to both sides.
        longest: the file is exact for texts of up to this many tokens.
    """

    architecture: Architecture
    rope: Rope
    local_rope: Rope | None
    period: int | None
    vocabulary: Vocabulary
    tensors: list[Tensor]
    storage: Storage
    longest: int
    notes: list[str]


def plan(encoder: Encoder, storage: Storage) -> Plan:
    """Translates the encoder into llama.cpp's terms.

    Raises:
        UserError: llama.cpp cannot express it.
    """
    trunk, settings = encoder.trunk, encoder.settings
    config = trunk.config
    architecture = architecture_of(config)
    if encoder.causal:
        raise UserError(
            "--format gguf exports bidirectional encoders, and this one is causal: use --format transformers "
            "and then llama.cpp's own converter"
        )
    check_can_be_said(encoder)
    period = window_period(config) if architecture.window == "both" else None
    rope, local_rope = _ropes(trunk, architecture)
    longest = _longest(config, architecture, rope, settings.max_tokens)
    vocabulary = vocabulary_of(
        encoder.tokenizer,
        config.vocab_size,
        special_tokens=settings.special_tokens,
        end_with_eos=settings.pooling == "eos",
    )
    tensors = tensors_of(trunk, architecture, rope, storage)
    notes = [*notes_of(encoder, settings.max_tokens), *vocabulary.notes]
    return Plan(architecture, rope, local_rope, period, vocabulary, tensors, storage, longest, notes)


def _ropes(trunk: Any, architecture: Architecture) -> tuple[Rope, Rope | None]:
    """Returns the RoPE of all layers; or that of the full layers, and that of the layers with a window."""
    kind = trunk.config.model_type
    if architecture.window != "both":
        rope = rope_of(trunk)
        check_can_hold(rope, architecture.rope_tensors, kind)
        return rope, None
    full, local = rope_of(trunk, "full_attention"), rope_of(trunk, "sliding_attention")
    check_can_hold(full, architecture.rope_tensors, kind)
    check_is_plain(local, kind)
    return full, local


def _longest(config: Any, architecture: Architecture, rope: Rope, max_tokens: int) -> int:
    limits = {"max_position_embeddings": config.max_position_embeddings}
    if architecture.window != "both" and (window := window_of(config)) is not None:
        limits["the sliding window, which llama.cpp cannot apply to both sides,"] = window
    if rope.longest is not None:
        limits["RoPE, whose frequencies change for longer texts,"] = rope.longest
    reason, longest = min(limits.items(), key=lambda item: item[1])
    if max_tokens > longest:
        raise UserError(
            f"--format gguf: {reason} allows texts of at most {longest} tokens, but this encoder takes "
            f"{max_tokens}: run Encoder.from_pretrained(FOLDER, settings={{'max_tokens': {longest}}})"
            ".save(OTHER), then export OTHER"
        )
    return longest


def write(file: Path, encoder: Encoder, plan: Plan, about: dict[str, str]) -> None:
    """Writes the file, with one weight in memory at a time. `about` holds values of `general.` keys."""
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[plan.architecture.name]])
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(plan.storage.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_numbers(writer, encoder, plan)
    _add_vocabulary(writer, plan.vocabulary)
    for tensor in plan.tensors:
        per_block, n_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        size = math.prod(tensor.shape) // per_block * n_bytes
        # The dtype may be anything but uint8. For uint8, the writer takes the shape as a number of bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in values_of(encoder.trunk, plan.architecture, plan.rope, plan.tensors):
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _add_numbers(writer: GGUFWriter, encoder: Encoder, plan: Plan) -> None:
    config, rope, local = encoder.trunk.config, plan.rope, plan.local_rope
    writer.add_context_length(plan.longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_causal_attention(False)
    writer.add_pooling_type(POOLING_TYPES[encoder.settings.pooling])
    writer.add_rope_dimension_count(rope.n_dims)
    writer.add_rope_freq_base(rope.base)
    if rope.scale != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.scale)
    if rope.attention != 1:
        writer.add_rope_scaling_attn_factors(rope.attention)
    if local is not None:
        writer.add_rope_freq_base_swa(local.base)
    _add_window(writer, plan, config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{name}")(cap)


def _add_window(writer: GGUFWriter, plan: Plan, config: Any) -> None:
    """Writes the sliding window.

    For a window to both sides, llama.cpp takes the whole width. transformers counts one side and the token.
    """
    window = window_of(config)
    if plan.architecture.window == "past" and window is not None:
        writer.add_sliding_window(window)
    if plan.period is not None and window is not None:
        writer.add_sliding_window(2 * (window - 1))
        writer.add_sliding_window_pattern(plan.period)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in vocabulary.keys.items():
        kinds[type(value)](f"tokenizer.ggml.{key}", value)
