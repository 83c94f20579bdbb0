"""Finds the llama.cpp architecture that computes the same as a trunk's model type.

What each architecture does was read in llama.cpp's `src/models/*.cpp` (November 2026). A config that needs
anything else is refused, with the setting's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's version of a model type.

    Attributes:
        name: name in `gguf.MODEL_ARCH`.
        pairs_side_by_side: llama.cpp's RoPE rotates dimensions 2i and 2i+1 together. transformers rotates i
            and i+d/2, so the rows of q and k need another order.
        norm_offset: number to add to RMSNorm weights, because llama.cpp's RMSNorm does not add it.
        window: what the sliding window masks. `past` masks only tokens too far back, not those too far ahead.
        rope_tensors: names of the tensors that hold a factor for each RoPE frequency.
    """

    name: str
    activation: str = "silu"
    pairs_side_by_side: bool = False
    norm_offset: float = 0.0
    window: Literal["none", "past", "both"] = "none"
    rope_tensors: tuple[str, ...] = ()


LLAMA = Architecture("LLAMA_EMBED", pairs_side_by_side=True, rope_tensors=("rope_freqs.weight",))
GELU = "gelu_pytorch_tanh"
TYPES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA", GELU, norm_offset=1.0),
    "gemma2": Architecture("GEMMA2", GELU, norm_offset=1.0, window="past"),
    "gemma3_text": Architecture("GEMMA_EMBEDDING", GELU, norm_offset=1.0, window="both"),
    "phi3": Architecture("PHI3", rope_tensors=("rope_factors_long.weight", "rope_factors_short.weight")),
}
LAYERS_OF_GEMMA2_27B = 46
"""llama.cpp scales the attention scores in another way if the model has this many layers."""


def architecture_of(config: Any) -> Architecture:
    """Returns the architecture for a trunk's config.

    Raises:
        UserError: llama.cpp has no such architecture, or does not support these settings.
    """
    kind = config.model_type
    if kind not in TYPES:
        raise UserError(
            f"--format gguf: model type {kind!r} is not known to work in llama.cpp with bidirectional "
            f"attention (known types: {', '.join(TYPES)}): use --format sentence-transformers"
        )
    found = TYPES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        raise _refused(kind, f"hidden_act={activation!r}", found.activation)
    _check_scores(config)
    return found


def _check_scores(config: Any) -> None:
    kind, heads = config.model_type, config.num_attention_heads
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        is_27b = kind == "gemma2" and config.num_hidden_layers == LAYERS_OF_GEMMA2_27B
        expected = config.hidden_size // heads if is_27b else head_dim(config)
        if scalar != expected:
            raise _refused(kind, f"query_pre_attn_scalar={scalar}", expected)
    cap = getattr(config, "attn_logit_softcapping", None)
    if (cap is None) == (kind == "gemma2"):
        raise _refused(kind, f"attn_logit_softcapping={cap}", "a number for gemma2 and none for other types")
    if kind == "phi3" and head_dim(config) * heads != config.hidden_size:
        raise _refused(kind, f"head_dim={head_dim(config)}", config.hidden_size // heads)


def _refused(kind: str, found: str, expected: object) -> UserError:
    return UserError(
        f"--format gguf: llama.cpp does not support {kind} with {found}, it expects {expected}: "
        "use --format sentence-transformers"
    )


def head_dim(config: Any) -> int:
    """Returns the width of one query head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any) -> int | None:
    """Returns how many tokens a layer with a window sees to one side, the token itself included.

    None if no layer has a window.
    """
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return int(window) if window is not None and "sliding_attention" in layers else None


def window_period(config: Any) -> int:
    """Returns the period of full layers. With a period of n, every n-th layer has no window.

    Raises:
        UserError: there is no such period, or all layers are of one kind, which makes llama.cpp exit.
    """
    is_full = [kind == "full_attention" for kind in config.layer_types]
    period = is_full.index(True) + 1 if True in is_full else 0
    if period < 2 or is_full != [(i + 1) % period == 0 for i in range(len(is_full))]:
        raise UserError(
            "--format gguf: llama.cpp needs one layer without a sliding window after every fixed number of "
            "layers with one: use --format sentence-transformers"
        )
    return period
