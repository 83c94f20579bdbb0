"""A trunk's type → the architecture of llama.cpp that computes the same, and its numbers.

What llama.cpp does with each architecture was read in its `src/models/*.cpp` (November 2026). A config that
asks for something else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a type of trunk.

    `name`: of `gguf.MODEL_ARCH`. `pairs_side_by_side`: RoPE turns dimensions 2i and 2i+1, where transformers
    turns i and i+d/2, so that the rows of q and k stand in another order. `norm_offset`: what its RMSNorm
    leaves out of the weight. `window`: what its sliding window masks; `past` does not mask what is too far
    ahead. `rope_tensors`: where it reads a factor for each frequency.
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
"""By which llama.cpp takes another scale of the scores."""


def architecture_of(config: Any) -> Architecture:
    """Of a trunk's config.

    Raises:
        UserError: llama.cpp has no such architecture, or not with these settings.
    """
    kind = config.model_type
    if kind not in TYPES:
        raise UserError(
            f"--format gguf: model type {kind!r} is not known to be right in llama.cpp without causal "
            f"attention; known are {', '.join(TYPES)}. Use --format sentence-transformers"
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
        raise _refused(kind, f"attn_logit_softcapping={cap}", "a number for gemma2, none for others")
    if kind == "phi3" and head_dim(config) * heads != config.hidden_size:
        raise _refused(kind, f"head_dim={head_dim(config)}", config.hidden_size // heads)


def _refused(kind: str, found: str, expected: object) -> UserError:
    return UserError(
        f"--format gguf: {kind} with {found} is not in llama.cpp, which has {expected}: "
        "use --format sentence-transformers"
    )


def head_dim(config: Any) -> int:
    """Of one query head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any) -> int | None:
    """Tokens that a windowed layer sees to one side, itself counted; None: every layer sees all."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return int(window) if window is not None and "sliding_attention" in layers else None


def window_period(config: Any) -> int:
    """Every how many layers one sees all: llama.cpp takes a period.

    Raises:
        UserError: there is none, or all layers are of one kind, with which it ends its process.
    """
    is_full = [kind == "full_attention" for kind in config.layer_types]
    period = is_full.index(True) + 1 if True in is_full else 0
    if period < 2 or is_full != [(i + 1) % period == 0 for i in range(len(is_full))]:
        raise UserError(
            "--format gguf: llama.cpp wants layers with a window, and one without at each place of a period: "
            "use --format sentence-transformers"
        )
    return period
