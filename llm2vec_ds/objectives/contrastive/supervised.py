"""Supervised contrastive learning: queries, their positives, hard negatives; each batch from one source."""

from __future__ import annotations

import logging

from llm2vec_ds.data.batches import SourceBatches
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.base import Parts
from llm2vec_ds.objectives.contrastive.objective import (
    ContrastiveObjective,
    ContrastiveStage,
    contrastive_model,
    section_of,
)
from llm2vec_ds.recipe.objectives import SupervisedConfig

log = logging.getLogger(__name__)


class Supervised(ContrastiveObjective):
    """In-batch negatives are all positives and hard negatives of the batch (arXiv 2404.05961, section 4)."""

    section = SupervisedConfig

    def build(self, parts: Parts) -> ContrastiveStage:
        """As `Objective.build`.

        Raises:
            UserError: also where a batch is one example, and an example has no hard negative.
        """
        recipe, pairs = parts.recipe, parts.training
        assert isinstance(pairs, PreparedPairs)
        assert not isinstance(parts.held_out, PreparedTexts)
        assert recipe.data.pairs is not None
        log.info("supervised: %s", ", ".join(f"{n} {size}" for n, size in pairs.group_sizes.items()))
        batch_size = recipe.batch.global_batch_size
        if batch_size == 1 and pairs.n_without_negatives:
            raise UserError(
                f"batch.global_batch_size=1: {pairs.n_without_negatives} of {len(pairs)} examples have no "
                "hard negative, so that their loss is always 0: raise it, or give each of them a negative"
            )
        group_sizes, temperature = tuple(pairs.group_sizes.values()), recipe.data.pairs.sampling_temperature
        return ContrastiveStage(
            contrastive_model(parts),
            pairs.__getitem__,
            SourceBatches(group_sizes, batch_size, recipe.seed, temperature),
            section_of(recipe),
            parts.held_out,
            data_fingerprint=pairs.fingerprint,
            seed=recipe.seed,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
        )
