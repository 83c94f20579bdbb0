"""The work of one rank in a step: texts, micro-batches, vectors of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.base import PlannedWork
from llm2vec_ds.objectives.registry import objective_of
from llm2vec_ds.recipe.recipe import Recipe

FP32 = 4
TILE = 64 * 2**20
"""Size of the loss's score tile, in bytes."""


@dataclass(frozen=True)
class Workload:
    """The work of one rank in a step, if every text is as long as the recipe allows.

    Attributes:
        texts: texts of one rank in a step.
        texts_per_pass: texts in one micro-batch.
        rows: rows of the global batch that one rank has.
        documents: one rank's vectors that all ranks see. 0: ranks exchange none.
        micro_batches: micro-batches of one rank in a step.
    """

    tokens_per_text: int
    texts: int
    texts_per_pass: int
    rows: int
    documents: int
    world_size: int
    objective: PlannedWork

    @property
    def micro_batches(self) -> int:
        return -(-self.texts // self.texts_per_pass)

    @property
    def cached(self) -> bool:
        """Whether the embedding cache runs."""
        return self.objective.embedding_cache and self.micro_batches > 1

    @property
    def forwards(self) -> int:
        """Forward passes of a step, without those that activation checkpointing repeats."""
        return self.micro_batches * (2 if self.cached else 1)


def workload(recipe: Recipe, world_size: int) -> Workload:
    """Returns the work of one rank. Raises UserError if the batch has fewer examples than there are ranks."""
    batch = recipe.batch
    if batch.global_batch_size < world_size:
        raise UserError(
            f"batch.global_batch_size={batch.global_batch_size} leaves some of {world_size} ranks without "
            "an example: raise it, or plan for fewer GPUs"
        )
    examples = -(-batch.global_batch_size // world_size)
    work = objective_of(recipe).planned_work(recipe)
    texts = examples * work.texts_per_row
    a_pass = min(texts, max(1, batch.micro_batch_tokens // recipe.data.max_tokens))
    return Workload(
        tokens_per_text=recipe.data.max_tokens,
        texts=texts,
        texts_per_pass=a_pass,
        rows=examples,
        documents=examples * work.documents_per_row,
        world_size=world_size,
        objective=work,
    )


@dataclass(frozen=True)
class Bank:
    """Bytes of a step's vectors on one rank: `kept` through all passes, `in_loss` while the loss runs."""

    kept: int
    in_loss: int


def embedding_bank(load: Workload, width: int) -> Bank:
    """Returns the bytes of a step's vectors, all in fp32.

    kept: this rank's vectors and their gradients.
    in_loss: these, the normalised vectors, the exchanged vectors, the gradients of both, and a score tile.
    """
    if not load.objective.embedding_cache:
        return Bank(0, 0)
    vector = FP32 * width
    own = load.texts * vector
    # A gather holds the documents of all ranks. The ring holds one block and receives the next.
    parts = load.world_size if load.objective.exchange == "gather" else 2
    exchanged = 2 * parts * load.documents * vector if load.world_size > 1 else load.documents * vector
    tile = min(TILE, FP32 * load.rows * load.documents * load.world_size)
    return Bank(2 * own, 4 * own + exchanged + tile)
