"""An exponential moving average of what trains, held as the optimizer holds its own fp32 copy.

Each rank averages the tensors that its optimizer steps on: under ZeRO its part, so that a step costs neither
communication nor a second whole copy. To read or use the average it changes places with the weights, and the
way that reads and sets weights does the rest.
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
    """average ← d · average + (1 − d) · weights, d = min(decay, (1 + step) / (10 + step)), after each step.

    It begins with the weights after the first step. All ranks call together.
    """

    def __init__(self, state: TrainableState, decay: float) -> None:
        self._state, self._decay = state, decay
        self._averages: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, from 0."""
        weights = self._state.stepped()
        if not self._averages:
            self._averages = [weight.detach().clone() for weight in weights]
        kept = min(self._decay, (1 + step) / (10 + step))
        for average, weight in zip(self._averages, weights, strict=True):
            average.lerp_(weight, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the average in this context; nothing happens before the first step."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Average and weights change places, also in what forward passes read."""
        if not self._averages:
            return
        self._exchange()
        self._state.renew_working_copies()

    def write(self, folder: Path) -> Hashes:
        """Writes this rank's parts as `TrainableState.write` does; size and SHA-256 of each."""
        if not self._averages:
            return {}
        self._exchange()
        try:
            return self._state.write_values(folder, STEM)
        finally:
            self._exchange()

    @torch.no_grad()
    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Sets the average to what `files` hold. The weights are overwritten: load them afterwards.

        Raises:
            ValueError: there is no average, or not of this model.
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
