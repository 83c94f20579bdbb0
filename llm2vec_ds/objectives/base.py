"""What a stage is: its batches, its loss, its metrics. The trainer sees only this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_max_int
from llm2vec_ds.encoder.encoder import Encoder

Forward = Callable[[PackedBatch], Any]


class Backward(Protocol):
    """Adds the gradient of this rank's share of the global loss (shares add up to the loss)."""

    def __call__(self, share: torch.Tensor, *, rows: Sequence[int], last: bool) -> None:
        """`rows`: the texts behind `share`, for error messages. `last`: the step's last call."""


@dataclass(frozen=True)
class StepResult:
    """A step's outcome before the optimizer moves. `loss` is global, `n_tokens` this rank's."""

    loss: float
    n_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)
    """Texts of this rank with a non-finite loss or vector."""
    vectors_alike: bool = False
    """All texts of the global batch, not all equal themselves, have the same vector within rounding."""


class Stage(Protocol):
    """An objective with its data. Knows nothing of DeepSpeed, optimizers or schedules."""

    @property
    def model(self) -> nn.Module:
        """What the engine trains."""

    @property
    def encoder(self) -> Encoder:
        """The part of it that is the result."""

    @property
    def data_fingerprint(self) -> str:
        """The same for the same training texts, tokenised alike."""

    def global_batch(self, step: int) -> np.ndarray:
        """Rows of a step over all ranks, a pure function of data, seed and step."""

    def text(self, row: int) -> TokenizedText:
        """What a row is, for error messages."""

    def batches(self, step: int, rows: np.ndarray) -> Any:
        """This rank's `rows` of the global batch as packed micro-batches on the CPU, in the form that the
        stage's own `step` takes; called from a thread of its own."""

    def step(
        self, step: int, rows: np.ndarray, batches: Any, forward: Forward, backward: Backward
    ) -> StepResult:
        """Forward and backward for `rows`, whose micro-batches are `batches`."""

    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Metrics on texts that do not train, the same on every rank; None without such texts."""


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Keys dropout by what is computed and not by history, so that a pass can be replayed."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def equal_count(micro_batches: list[np.ndarray], device: torch.device) -> int:
    """Micro-batches that every rank must run: the most that any has. Under ZeRO-3 a rank that runs its
    modules less often leaves the others waiting."""
    return all_reduce_max_int(len(micro_batches), device)
