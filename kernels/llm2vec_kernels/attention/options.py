"""What a call of packed attention computes, whichever backend does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """Checked when it is made, so that no backend has to.

    Raises:
        ValueError: an attribute is out of its range; the message names it.
    """

    softmax_scale: float
    """Factor of the scores q·k."""
    window: int | None = None
    """Inclusive reach, |i − j| ≤ window; None sees the whole text."""
    softcap: float | None = None
    """c in c·tanh(score / c) (Gemma 2, arXiv 2408.00118); None leaves scores as they are."""
    dropout_p: float = 0.0
    """Share of attention weights dropped, in [0, 1); the others are divided by 1 − dropout_p."""
    causal: bool = False
    """Keys after the query are hidden (for the causal baseline only)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ValueError(f"window {self.window} is negative: it is an inclusive reach, 0 or more")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap {self.softcap} is not positive: None turns it off")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p {self.dropout_p} is not in [0, 1)")
