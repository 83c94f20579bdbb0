"""Converts the frequencies of a trunk's rotary embedding (RoPE) to llama.cpp's form.

llama.cpp computes base^(-2i/d) itself. The trunk's own frequencies are read and compared with these. If all
are divided by one number, that is a linear scaling. If each is divided by another number (Llama 3, YaRN,
LongRoPE), the file gets a tensor of factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.rope import length_of_change

SAME = 1e-5
"""Two fp32 frequencies count as equal if their relative difference is below this."""


@dataclass(frozen=True)
class Rope:
    """RoPE in llama.cpp's form.

    Attributes:
        n_dims: dimensions of a head that are rotated.
        scale: all frequencies are divided by it.
        factors: each frequency is divided by its own factor, `[n_dims/2]`.
        attention: cosines and sines are multiplied by it.
        longest: frequencies change for texts of more tokens. None: they never change.
    """

    base: float
    n_dims: int
    scale: float
    factors: np.ndarray | None
    attention: float
    longest: int | None


def rope_of(trunk: Any, layer_type: str | None = None) -> Rope:
    """Returns the RoPE of all layers, or of the layers of one type."""
    embedding = getattr(trunk.rotary_emb, "rope", trunk.rotary_emb)  # the module inside `RopeByText`
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
        longest=length_of_change(trunk.config, parameters),
    )


def check_can_hold(rope: Rope, tensors: tuple[str, ...], kind: str) -> None:
    """Checks that llama.cpp reads factors for this architecture, if there are any.

    Raises:
        UserError: it reads none.
    """
    if rope.factors is not None and not tensors:
        raise UserError(
            f"--format gguf: llama.cpp reads no factors of RoPE's frequencies for {kind}: "
            "use --format sentence-transformers"
        )


def check_is_plain(rope: Rope, kind: str) -> None:
    """Checks that layers with a window have the frequencies base^(-2i/d). llama.cpp reads only their base.

    Raises:
        UserError: the frequencies are scaled.
    """
    if (rope.factors, rope.scale, rope.attention) != (None, 1.0, 1.0):
        raise UserError(
            f"--format gguf: llama.cpp does not scale RoPE in the sliding-window layers of {kind}: "
            "use --format sentence-transformers"
        )
