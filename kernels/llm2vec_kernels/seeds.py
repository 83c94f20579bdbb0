"""Seeds of dropout that stay on the device: whoever replays a CUDA graph writes another one there."""

from __future__ import annotations

import torch

MADE_AT_ONCE = 256


def drawn_seed(device: torch.device) -> torch.Tensor:
    """An int64 scalar from torch's default CPU generator, which `torch.manual_seed` sets back."""
    return torch.randint(2**62, ()).to(device, non_blocking=True)


class Seeds:
    """The seeds of one forward pass, one after the other, all of them made from one.

    Call number i gets `first + i`. Kernels use a seed as a key of Philox, or hash it, so that neighbours
    have nothing in common.
    """

    def __init__(self, first: torch.Tensor) -> None:
        """Args: first: int64 scalar on the device."""
        self._first = first
        self._made_N: torch.Tensor | None = None
        self._n_used = 0

    def next(self) -> torch.Tensor:
        """int64 scalar on the device."""
        place = self._n_used % MADE_AT_ONCE
        if self._made_N is None or place == 0:
            past = self._n_used + MADE_AT_ONCE
            self._made_N = self._first + torch.arange(self._n_used, past, device=self._first.device)
        self._n_used += 1
        return self._made_N[place]
