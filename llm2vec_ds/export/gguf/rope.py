"""The frequencies of a trunk's rotary embedding, as llama.cpp takes them: read from the trunk, however made.

llama.cpp computes base^(-2i/d) by itself. Where the trunk's frequencies are these over one number, that is a
linear scaling; where each has another number (Llama 3, YaRN, LongRoPE), a tensor of factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2vec_ds.errors import UserError

SAME = 1e-5
"""Relative difference of two frequencies that are one: they are fp32."""


@dataclass(frozen=True)
class Rope:
    """`n_dims`: dimensions of a head that are turned. `scale`: all frequencies are divided by it. `factors`:
    each by one of these, `[n_dims/2]`. `attention`: what cosines and sines are multiplied with. `longest`:
    tokens of a text beyond which the frequencies change; None: never."""

    base: float
    n_dims: int
    scale: float
    factors: np.ndarray | None
    attention: float
    longest: int | None


def rope_of(trunk: Any, layer_type: str | None = None) -> Rope:
    """Of the layers of a type, or of all."""
    embedding = getattr(trunk.rotary_emb, "rope", trunk.rotary_emb)  # without `RopeByText` around it
    prefix = f"{layer_type}_" if layer_type else ""
    parameters = trunk.config.rope_parameters
    parameters = parameters[layer_type] if layer_type else parameters
    found = getattr(embedding, f"{prefix}inv_freq").double().numpy()
    base, n_dims = float(parameters["rope_theta"]), 2 * len(found)
    factors = base ** (-np.arange(0, n_dims, 2) / n_dims) / found
    is_one_number = bool(np.allclose(factors, factors[0], rtol=SAME))
    scale = 1.0 if np.isclose(factors[0], 1, rtol=SAME) else float(factors[0])
    return Rope(
        base=base,
        n_dims=n_dims,
        scale=scale if is_one_number else 1.0,
        factors=None if is_one_number else factors.astype(np.float32),
        attention=float(getattr(embedding, f"{prefix}attention_scaling")),
        longest=_longest(parameters, trunk.config),
    )


def length_of_change(config: Any) -> int | None:
    """The number of tokens beyond which a trunk's frequencies change, in any of its layers; None: never."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    found = [_longest(one, config) for one in by_layer_type or [parameters]]
    return min((longest for longest in found if longest is not None), default=None)


def _longest(parameters: dict[str, Any], config: Any) -> int | None:
    kind = parameters.get("rope_type", "default")
    if kind not in ("dynamic", "longrope"):
        return None
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)


def check_can_hold(rope: Rope, tensors: tuple[str, ...], kind: str) -> None:
    """Refuses factors where an architecture reads none.

    Raises:
        UserError: it does not.
    """
    if rope.factors is not None and not tensors:
        raise UserError(
            f"--format gguf: llama.cpp reads no factors of RoPE's frequencies for {kind}: "
            "use --format sentence-transformers"
        )


def check_is_plain(rope: Rope, kind: str) -> None:
    """Refuses anything but base^(-2i/d) in layers with a window, of which llama.cpp reads the base alone.

    Raises:
        UserError: it is scaled.
    """
    if (rope.factors, rope.scale, rope.attention) != (None, 1.0, 1.0):
        raise UserError(
            f"--format gguf: llama.cpp reads no scaling of RoPE in layers of {kind} with a window: "
            "use --format sentence-transformers"
        )
