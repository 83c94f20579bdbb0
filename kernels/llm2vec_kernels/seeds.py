"""Seeds of dropout that stay on the device, so that a CUDA graph can be replayed with another seed."""

from __future__ import annotations

import torch

MADE_AT_ONCE = 256
"""One addition on the device makes this many seeds. Taking one of them starts no operation there."""


def drawn_seed(device: torch.device) -> torch.Tensor:
    """Draws an int64 scalar from torch's default CPU generator, which `torch.manual_seed` resets."""
    return torch.randint(2**62, ()).to(device, non_blocking=True)


class Seeds:
    """The seeds of one forward pass, one after the other, all made from one seed.

    Call number i gets `first + i`. Kernels use a seed as a key of Philox, or hash it. So the masks of
    neighbouring seeds have nothing in common.
    """

    def __init__(self, first: torch.Tensor) -> None:
        """Args: first: int64 scalar on the device."""
        self._first = first
        self._made_N: torch.Tensor | None = None
        self._n_used = 0

    def next(self) -> torch.Tensor:
        """Returns the next seed, an int64 scalar on the device."""
        place = self._n_used % MADE_AT_ONCE
        if self._made_N is None or place == 0:
            past = self._n_used + MADE_AT_ONCE
            self._made_N = self._first + torch.arange(self._n_used, past, device=self._first.device)
        self._n_used += 1
        return self._made_N[place]
