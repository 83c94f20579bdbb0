"""Notes how a cheap operation made a tensor. Backward can then recompute the tensor and need not keep it.

Linear layers keep their input for backward. That input is often the output of a norm or of a gated unit. The
inputs of the norm or unit are kept anyway. So its output carries a note of them. A layer that knows such
notes (`lora_linear`) keeps these inputs in place of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Make = Callable[..., torch.Tensor]


class Recompute:
    """Recomputes a tensor, once for all layers that need it. In backward they run one after the other."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self._n_left = 0
        self._value: torch.Tensor | None = None

    def kept(self) -> Recompute:
        """Counts one more layer that will ask for the tensor. The value is dropped after the last one."""
        self._n_left += 1
        return self

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        value = self.make(*inputs) if self._value is None else self._value
        self._n_left -= 1
        self._value = value if self._n_left > 0 else None
        return value


class Origin(NamedTuple):
    """How to recompute a tensor, and from which inputs."""

    recompute: Recompute
    inputs: tuple[torch.Tensor, ...]


def note_origin(out: torch.Tensor, make: Make, *inputs: torch.Tensor) -> torch.Tensor:
    """Notes that `make(*inputs)` equals `out` to the bit. Returns `out`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out.llm2vec_origin = Origin(Recompute(make), inputs)  # type: ignore[attr-defined]
    return out


def note_drop(dropped: torch.Tensor, x: torch.Tensor, drop: Make, mask: torch.Tensor) -> torch.Tensor:
    """Notes that `drop(x, mask=mask)` equals `dropped`. Returns `dropped`. x may have an origin itself."""
    make, kept = _origin(x)
    return note_origin(dropped, lambda mask, *kept: drop(make(*kept), mask=mask), mask, *kept)


def how_to_keep(x: torch.Tensor) -> tuple[Make, tuple[torch.Tensor, ...]]:
    """Returns a function that recomputes x, to be called once, and the tensors to save for it."""
    origin: Origin | None = getattr(x, "llm2vec_origin", None)
    return (_itself, (x,)) if origin is None else (origin.recompute.kept(), origin.inputs)


def _origin(x: torch.Tensor) -> tuple[Make, tuple[torch.Tensor, ...]]:
    origin: Origin | None = getattr(x, "llm2vec_origin", None)
    return (_itself, (x,)) if origin is None else (origin.recompute.make, origin.inputs)


def _itself(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x
