"""SimCSE: each text runs twice, with different dropout. The other texts of the batch are negatives."""

from __future__ import annotations

import logging

from llm2vec_ds.data.batches import EpochBatches
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.objectives.base import Parts
from llm2vec_ds.objectives.contrastive.objective import (
    ContrastiveObjective,
    ContrastiveStage,
    contrastive_model,
    section_of,
)
from llm2vec_ds.recipe.objectives import SimcseConfig

log = logging.getLogger(__name__)


class Simcse(ContrastiveObjective):
    """Trains a text's two vectors as a positive pair (Gao et al., 2021, arXiv 2104.08821).

    There is no held-out loss: without dropout, the two vectors of a text are equal.
    """

    section = SimcseConfig

    def build(self, parts: Parts) -> ContrastiveStage:
        recipe, texts = parts.recipe, parts.training
        assert isinstance(texts, PreparedTexts)
        if parts.held_out is not None:
            log.warning("simcse has no held-out loss: it ignores data.held_out_path. Measure by `evaluation`")
        return ContrastiveStage(
            contrastive_model(parts),
            lambda rows: [[text, text] for text in texts[rows]],
            EpochBatches(len(texts), recipe.batch.global_batch_size, recipe.seed),
            section_of(recipe),
            data_fingerprint=texts.fingerprint,
            seed=recipe.seed,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
        )
