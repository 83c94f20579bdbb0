"""What one rank does in a step: texts, micro-batches, vectors of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import Recipe

FP32 = 4
TILE = 64 * 2**20
"""The loss's score tile, in bytes."""


@dataclass(frozen=True)
class Workload:
    """Every text taken for the longest that the recipe allows.

    Attributes:
        texts: of one rank in a step.
        texts_a_pass: in one micro-batch.
        documents: positives and hard negatives of one rank; 0 for MNTP.
        micro_batches: of one rank in a step.
    """

    tokens_a_text: int
    texts: int
    texts_a_pass: int
    queries: int
    documents: int
    world_size: int

    @property
    def micro_batches(self) -> int:
        return -(-self.texts // self.texts_a_pass)

    @property
    def cached(self) -> bool:
        """Does the embedding cache run?"""
        return self.documents > 0 and self.micro_batches > 1

    @property
    def forwards(self) -> int:
        """Forward passes of a step, those of activation checkpointing left out."""
        return self.micro_batches * (2 if self.cached else 1)


def workload(recipe: Recipe, world_size: int) -> Workload:
    """Raises UserError where the batch has fewer examples than there are ranks."""
    batch = recipe.batch
    if batch.global_batch_size < world_size:
        raise UserError(
            f"batch.global_batch_size={batch.global_batch_size} gives nothing to some of {world_size} ranks: "
            "raise it, or plan for fewer GPUs"
        )
    examples = -(-batch.global_batch_size // world_size)
    a_query = 0 if recipe.contrastive is None else 1 + _negatives(recipe)
    texts = examples * (1 + a_query)
    a_pass = min(texts, max(1, batch.max_tokens_per_micro_batch // recipe.data.max_tokens))
    return Workload(recipe.data.max_tokens, texts, a_pass, examples, examples * a_query, world_size)


def _negatives(recipe: Recipe) -> int:
    return 0 if recipe.data.pairs is None else recipe.data.pairs.max_negatives


@dataclass(frozen=True)
class Bank:
    """Bytes of a contrastive step's vectors on one rank: through the step, and while the loss runs."""

    kept: int
    in_loss: int


def embedding_bank(load: Workload, width: int, exchange: str) -> Bank:
    """Vectors and their gradients in fp32; the loss adds normalised ones, what ranks exchange, and a tile."""
    if not load.documents:
        return Bank(0, 0)
    vector = FP32 * width
    own = load.texts * vector
    parts = load.world_size if exchange == "gather" else 2  # the ring holds its own and the next rank's
    exchanged = 2 * parts * load.documents * vector if load.world_size > 1 else load.documents * vector
    tile = min(TILE, FP32 * load.queries * load.documents * load.world_size)
    return Bank(2 * own, 4 * own + exchanged + tile)
