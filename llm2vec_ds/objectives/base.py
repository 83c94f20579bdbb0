"""What an objective and its stage offer: batches, loss, metrics. Engine and planner see nothing else."""

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
    """Adds the gradient of this rank's share of the global loss. All ranks' shares add up to the loss."""

    def __call__(self, share: torch.Tensor, *, rows: Sequence[int], last: bool) -> None:
        """`rows`: the rows behind `share`, for error messages. `last`: True in the step's last call."""


@dataclass(frozen=True)
class StepResult:
    """The result of forward and backward, before the optimizer runs.

    `loss` covers all ranks, `n_tokens` this rank only.
    """

    loss: float
    n_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    bad_rows: Callable[[], list[int]] = list
    """Returns this rank's rows with a NaN or an infinity in loss or vector. Called only if a step had one."""
    vectors_alike: bool = False
    """True if the texts of the global batch differ, but all their vectors are equal up to rounding."""


class Stage(Protocol):
    """An objective with its model and data. It does not know DeepSpeed, optimizers or schedules."""

    micro_batch_tokens: int

    @property
    def model(self) -> nn.Module:
        """The module that the engine trains."""

    @property
    def encoder(self) -> Encoder:
        """The part of the model that training is for: it is saved as the result."""

    @property
    def data_fingerprint(self) -> str:
        """Equal for equal training texts with the same tokens."""

    @property
    def global_batch(self) -> GlobalBatches:
        """The rows of each step over all ranks, and the number of steps of an epoch."""

    def text(self, row: int) -> TokenizedText:
        """Returns a row's text, for error messages."""

    def batches(self, step: int, rows: np.ndarray) -> Any:
        """Packs this rank's `rows` of the global batch into micro-batches on the CPU, for `step`.

        The engine calls this in a background thread.
        """

    def step(
        self, step: int, rows: np.ndarray, batches: Any, forward: Forward, backward: Backward
    ) -> StepResult:
        """Runs forward and backward for `rows`, whose micro-batches are `batches`."""

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        """Packs `texts` into one micro-batch that needs as much compute as a training batch ever does."""

    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Returns metrics on held-out texts, the same on every rank; None without such texts."""


Rows = PreparedTexts | PreparedPairs


@dataclass(frozen=True)
class Parts:
    """The parts that every stage is built from.

    Attributes:
        language_head: the model's, if the objective `uses_language_head`.
        training, held_out: texts, or pairs if the objective's section `reads_pairs`.
    """

    recipe: Recipe
    encoder: Encoder
    language_head: nn.Linear | None
    training: Rows
    held_out: Rows | None


@dataclass(frozen=True)
class PlannedWork:
    """The work of a step beyond running its texts through the trunk, for the planner.

    Attributes:
        texts_per_row: texts in a row of the global batch.
        embedding_cache: True if the loss needs the vectors of all texts of a step at once.
        documents_per_row: how many of a row's texts every rank sees. With 0, ranks exchange no vectors.
        rounds_again_per_row: how many of a row's texts go around the ring a second time (`exchange: ring`).
        exchange, bytes_per_number: how vectors travel between ranks.
        head_rows_per_token: rows of the language head for each token of the batch.
        trainable: shapes of the parameters that train besides the trunk and its adapters.
        follows_another: True if the stage usually starts from the encoder of an earlier stage.
    """

    texts_per_row: int = 1
    embedding_cache: bool = False
    documents_per_row: int = 0
    rounds_again_per_row: int = 0
    exchange: str = "gather"
    bytes_per_number: int = 4
    head_rows_per_token: float = 0.0
    trainable: tuple[torch.Size, ...] = ()
    follows_another: bool = False


class Objective(ABC):
    """One way to train an encoder. `registry` lists them. An objective holds no state.

    Attributes:
        section: the recipe section of the objective. Its key is the stage's name.
        uses_language_head: True if the model is loaded with its language head.
    """

    section: ClassVar[type[ObjectiveConfig]]
    uses_language_head: ClassVar[bool] = False

    def prepare(self, recipe: Recipe) -> None:
        """Makes what the objective needs besides the texts, and stores it where `build` finds it.

        The `prepare` command calls this. In a run, rank 0 calls it while the other ranks wait.

        Raises:
            UserError: it cannot be made.
        """
        return None

    def data_fingerprint(self, recipe: Recipe, training: Rows) -> str:
        """Returns a string that is equal for equal training texts, tokens and prepared files."""
        return training.fingerprint

    @abstractmethod
    def build(self, parts: Parts) -> Stage:
        """Builds the stage: model, batches, loss and metrics.

        Raises:
            UserError: the recipe does not suit this model or these data.
        """

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        """Returns the work of a step, for the planner."""
        return PlannedWork()

    def planned_head(self, language_head: nn.Linear | None, config: Any, recipe: Recipe) -> nn.Module | None:
        """Returns the module after the trunk, on the meta device, or None if there is none."""
        return None

    def planned_outcome(
        self, hidden_TD: torch.Tensor, batch: PackedBatch, head: nn.Module | None, recipe: Recipe
    ) -> torch.Tensor:
        """Runs what a micro-batch computes after the trunk, on the meta device."""
        return POOLINGS[recipe.pooling](hidden_TD, batch)


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Returns the seed of a pass's dropout. It depends on these four numbers only.

    The embedding cache runs each pass twice and needs the same dropout both times. A resumed run repeats the
    dropout of an uninterrupted one.
    """
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def equal_count(micro_batches: list[np.ndarray], device: torch.device) -> int:
    """Returns how many micro-batches every rank runs: the largest number that any rank has.

    Under ZeRO-3 all ranks gather a module's weights together. If one rank ran fewer micro-batches, the others
    would wait for it.
    """
    return all_reduce_max_int(len(micro_batches), device)
