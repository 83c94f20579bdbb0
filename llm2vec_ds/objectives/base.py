"""What an objective is, and a stage of it: batches, loss, metrics. Engine and planner see only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import GlobalBatches
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_max_int
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.recipe.objectives import ObjectiveConfig
from llm2vec_ds.recipe.recipe import Recipe

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
    bad_rows: Callable[[], list[int]] = list
    """Texts of this rank with a non-finite loss or vector; asked for where something was not finite."""
    vectors_alike: bool = False
    """All texts of the global batch, not all equal themselves, have the same vector within rounding."""


class Stage(Protocol):
    """An objective with its model and data. Knows nothing of DeepSpeed, optimizers or schedules."""

    micro_batch_tokens: int

    @property
    def model(self) -> nn.Module:
        """What the engine trains."""

    @property
    def encoder(self) -> Encoder:
        """The part of it that is the result."""

    @property
    def data_fingerprint(self) -> str:
        """The same for the same training texts, tokenised alike."""

    @property
    def global_batch(self) -> GlobalBatches:
        """Rows of a step over all ranks, and how many steps an epoch has."""

    def text(self, row: int) -> TokenizedText:
        """What a row is, for error messages."""

    def batches(self, step: int, rows: np.ndarray) -> Any:
        """This rank's `rows` of the global batch as packed micro-batches on the CPU, in the form that the
        stage's own `step` takes; called from a thread of its own."""

    def step(
        self, step: int, rows: np.ndarray, batches: Any, forward: Forward, backward: Backward
    ) -> StepResult:
        """Forward and backward for `rows`, whose micro-batches are `batches`."""

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        """`texts` as one micro-batch of training, with as much to compute as one can have."""

    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Metrics on texts that do not train, the same on every rank; None without such texts."""


Rows = PreparedTexts | PreparedPairs


@dataclass(frozen=True)
class Parts:
    """What a stage is built from: everything that is the same for all objectives.

    Attributes:
        language_head: of the model, where the objective `uses_language_head`.
        training, held_out: texts, or pairs where its section `reads_pairs`.
    """

    recipe: Recipe
    encoder: Encoder
    language_head: nn.Linear | None
    training: Rows
    held_out: Rows | None


@dataclass(frozen=True)
class PlannedWork:
    """What a step does beside running its texts through the trunk; the planner counts it.

    Attributes:
        texts_per_row: of a row of the global batch.
        documents_per_row: those of them that all ranks see; 0: ranks exchange no vectors, and no embedding
            cache runs.
        rounds_again_per_row: those that go round once more where `exchange` is `ring`.
        exchange, bytes_per_number: how vectors travel.
        head_rows_per_token: rows of the language head for each token of the batch.
        trainable: shapes of what trains beside the trunk and its adapters.
        follows_another: it usually starts from the encoder of an earlier stage.
    """

    texts_per_row: int = 1
    documents_per_row: int = 0
    rounds_again_per_row: int = 0
    exchange: str = "gather"
    bytes_per_number: int = 4
    head_rows_per_token: float = 0.0
    trainable: tuple[torch.Size, ...] = ()
    follows_another: bool = False


class Objective(ABC):
    """One way to train an encoder: an entry of `registry`. It holds no state.

    Attributes:
        section: what a recipe says of it, under the name of the stage.
        uses_language_head: the model is loaded with it.
    """

    section: ClassVar[type[ObjectiveConfig]]
    uses_language_head: ClassVar[bool] = False

    def prepare(self, recipe: Recipe) -> None:
        """Makes what it needs beside the texts, and keeps it on the disk where `build` finds it. The
        `prepare` command calls it, and rank 0 of a run while the others wait.

        Raises:
            UserError: it cannot be made.
        """
        return None

    def data_fingerprint(self, recipe: Recipe, training: Rows) -> str:
        """The same for the same training texts, tokenised alike, and what was prepared for them."""
        return training.fingerprint

    @abstractmethod
    def build(self, parts: Parts) -> Stage:
        """Model, batches, loss and metrics together.

        Raises:
            UserError: the recipe asks for what this model or these data cannot give.
        """

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        """For the planner."""
        return PlannedWork()

    def planned_head(self, language_head: nn.Linear | None, config: Any, recipe: Recipe) -> nn.Module | None:
        """The module behind the trunk, on the meta device; None: there is none."""
        return None

    def planned_outcome(
        self, hidden_TD: torch.Tensor, batch: PackedBatch, head: nn.Module | None, recipe: Recipe
    ) -> torch.Tensor:
        """What a micro-batch computes behind the trunk, on the meta device."""
        return POOLINGS[recipe.pooling](hidden_TD, batch)


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Keys dropout by what is computed and not by history, so that a pass can be replayed."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def equal_count(micro_batches: list[np.ndarray], device: torch.device) -> int:
    """Micro-batches that every rank must run: the most that any has. Under ZeRO-3 a rank that runs its
    modules less often leaves the others waiting."""
    return all_reduce_max_int(len(micro_batches), device)
