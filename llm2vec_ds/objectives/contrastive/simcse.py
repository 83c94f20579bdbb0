"""The SimCSE stage: each text twice, with different dropout; the other texts are negatives."""

from __future__ import annotations

from llm2vec_ds.data.batches import EpochBatches
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.objectives.contrastive.embedding_cache import ContrastiveModel
from llm2vec_ds.objectives.contrastive.objective import ContrastiveStage
from llm2vec_ds.recipe.sections import ContrastiveConfig


def simcse_stage(
    model: ContrastiveModel,
    texts: PreparedTexts,
    config: ContrastiveConfig,
    *,
    seed: int,
    global_batch_size: int,
    max_tokens_per_micro_batch: int,
) -> ContrastiveStage:
    """A text's two vectors are each other's positive (Gao et al., 2021, arXiv 2104.08821).

    It has no held-out loss: with dropout off, a text's two vectors are the same.
    """
    return ContrastiveStage(
        model,
        lambda rows: [[text, text] for text in texts[rows]],
        EpochBatches(len(texts), global_batch_size, seed),
        config,
        data_fingerprint=texts.fingerprint,
        seed=seed,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
    )
