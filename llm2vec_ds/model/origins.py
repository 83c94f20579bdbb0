"""What a cheap operation made a tensor of, so that backward can make it again in place of keeping it.

The linear layers that read a norm's or a gated unit's output keep it. The inputs of the norm or unit are kept
anyway. So its output carries a note of them, and a layer that knows such notes (`lora_linear`) keeps these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Make = Callable[..., torch.Tensor]


class Again:
    """Makes a tensor again, once for all that kept it: they run one after the other in backward."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self._n_left = 0
        self._value: torch.Tensor | None = None

    def kept(self) -> Again:
        """One more will ask."""
        self._n_left += 1
        return self

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        value = self.make(*inputs) if self._value is None else self._value
        self._n_left -= 1
        self._value = value if self._n_left > 0 else None
        return value


class Origin(NamedTuple):
    again: Again
    inputs: tuple[torch.Tensor, ...]


def note_origin(out: torch.Tensor, make: Make, *inputs: torch.Tensor) -> torch.Tensor:
    """`make(*inputs)` is `out`, to the bit; returns `out`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out.llm2vec_origin = Origin(Again(make), inputs)  # type: ignore[attr-defined]
    return out


def note_drop(dropped: torch.Tensor, x: torch.Tensor, drop: Make, mask: torch.Tensor) -> torch.Tensor:
    """`drop(x, mask=mask)` is `dropped`, and x may have an origin itself; returns `dropped`."""
    make, kept = _origin(x)
    return note_origin(dropped, lambda mask, *kept: drop(make(*kept), mask=mask), mask, *kept)


def how_to_keep(x: torch.Tensor) -> tuple[Make, tuple[torch.Tensor, ...]]:
    """What to save for backward in place of x, and what makes x of it, to be called once."""
    origin: Origin | None = getattr(x, "llm2vec_origin", None)
    return (_itself, (x,)) if origin is None else (origin.again.kept(), origin.inputs)


def _origin(x: torch.Tensor) -> tuple[Make, tuple[torch.Tensor, ...]]:
    origin: Origin | None = getattr(x, "llm2vec_origin", None)
    return (_itself, (x,)) if origin is None else (origin.again.make, origin.inputs)


def _itself(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x
