"""SimCSE: each text runs twice, and dropout differs. The other texts of the batch are negatives."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from llm2vec_ds.data.batches import EpochBatches
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.objectives.base import Parts
from llm2vec_ds.objectives.contrastive.objective import (
    ContrastiveObjective,
    ContrastiveStage,
    contrastive_model,
)
from llm2vec_ds.objectives.contrastive.word_dropout import WordDropout
from llm2vec_ds.recipe.objectives import SimcseConfig

log = logging.getLogger(__name__)


class Simcse(ContrastiveObjective):
    """Trains a text's two vectors as a positive pair (Gao et al., 2021, arXiv 2104.08821).

    There is no held-out loss: without dropout, the two vectors of a text are equal.
    """

    section = SimcseConfig

    def build(self, parts: Parts) -> ContrastiveStage:
        recipe, texts = parts.recipe, parts.training
        section = recipe.objective
        assert isinstance(texts, PreparedTexts)
        assert isinstance(section, SimcseConfig)
        if parts.held_out is not None:
            log.warning("simcse has no held-out loss: it ignores data.held_out_path. Measure by `evaluation`")
        leave_out = (
            WordDropout(parts.encoder.tokenizer, section.word_dropout) if section.word_dropout else None
        )

        def examples(rows: Sequence[int] | np.ndarray, step: int) -> list[list[TokenizedText]]:
            if leave_out is None:
                return [[text, text] for text in texts[rows]]
            return [
                [leave_out(text, (recipe.seed, step, int(row), side)) for side in (0, 1)]
                for row, text in zip(rows, texts[rows], strict=True)
            ]

        return ContrastiveStage(
            contrastive_model(parts),
            examples,
            EpochBatches(len(texts), recipe.batch.global_batch_size, recipe.seed),
            section,
            data_fingerprint=texts.fingerprint,
            seed=recipe.seed,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
        )
