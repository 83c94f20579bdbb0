"""The options of packed attention, the same for all backends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """What a call computes. Values are checked here, so no backend has to.

    Raises:
        ValueError: an attribute is out of its range; the message names it.
    """

    softmax_scale: float
    """Factor of the scores q·k."""
    window: int | None = None
    """Inclusive reach: token i sees j if |i − j| ≤ window. None: it sees the whole text."""
    softcap: float | None = None
    """c in c·tanh(score / c) (Gemma 2, arXiv 2408.00118). None leaves scores as they are."""
    dropout_p: float = 0.0
    """Share of attention weights that are dropped, in [0, 1). The others are divided by 1 − dropout_p."""
    causal: bool = False
    """Hides keys after the query. Only the causal baseline needs it."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ValueError(f"window {self.window} is negative: give an inclusive reach, 0 or more")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap {self.softcap} is not positive: None turns it off")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p {self.dropout_p} is not in [0, 1)")
