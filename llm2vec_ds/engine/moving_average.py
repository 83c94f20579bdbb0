"""An exponential moving average of the weights that train.

Each rank averages the fp32 tensors that its optimizer steps on. Under ZeRO these are its own part. So a step
needs no communication and no second whole copy.

To be read or used, the average changes places with the weights. Then the code that reads and sets weights
works for the average too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llm2vec_ds.engine.checkpoint import Hashes
from llm2vec_ds.engine.trainable_state import TrainableState

STEM = "average"


class MovingAverage:
    """After each step: average ← d · average + (1 − d) · weights, d = min(decay, (1 + step) / (10 + step)).

    The average starts as the weights after the first step. All ranks call each method together.
    """

    def __init__(self, state: TrainableState, decay: float) -> None:
        self._state, self._decay = state, decay
        self._averages: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, counted from 0."""
        weights = self._state.stepped()
        if not self._averages:
            self._averages = [weight.detach().clone() for weight in weights]
        kept = min(self._decay, (1 + step) / (10 + step))
        for average, weight in zip(self._averages, weights, strict=True):
            average.lerp_(weight, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's weights in this context. Does nothing before the first step."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and weights, also in the copies that forward passes read."""
        if not self._averages:
            return
        self._exchange()
        self._state.renew_working_copies()

    def write(self, folder: Path) -> Hashes:
        """Writes this rank's parts as `TrainableState.write` does. Returns size and SHA-256 of each file."""
        if not self._averages:
            return {}
        self._exchange()
        try:
            return self._state.write_values(folder, STEM)
        finally:
            self._exchange()

    @torch.no_grad()
    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Sets the average to the one in `files`. Overwrites the weights too, so load them afterwards.

        Raises:
            ValueError: `files` hold no average, or that of another model.
        """
        own = [file for file in files if file.startswith(f"{STEM}-")]
        if not own:
            raise ValueError(f"{folder}: there is no moving average in it")
        self._state.load_values(folder, own)
        self._averages = [weight.detach().clone() for weight in self._state.stepped()]

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self._averages, self._state.stepped(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
