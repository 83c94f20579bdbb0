"""The supervised stage: queries, their positives, hard negatives; each batch from one source."""

from __future__ import annotations

from llm2vec_ds.data.batches import SourceBatches
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.contrastive.embedding_cache import ContrastiveModel
from llm2vec_ds.objectives.contrastive.objective import ContrastiveStage
from llm2vec_ds.recipe.sections import ContrastiveConfig


def supervised_stage(
    model: ContrastiveModel,
    pairs: PreparedPairs,
    held_out_pairs: PreparedPairs | None,
    config: ContrastiveConfig,
    *,
    seed: int,
    global_batch_size: int,
    sampling_temperature: float,
    max_tokens_per_micro_batch: int,
) -> ContrastiveStage:
    """In-batch negatives are all positives and hard negatives of the batch (arXiv 2404.05961, section 4).

    Raises:
        UserError: a batch is one example, and an example has no hard negative; or too few examples.
    """
    if global_batch_size == 1 and pairs.n_without_negatives:
        raise UserError(
            f"batch.global_batch_size=1: {pairs.n_without_negatives} of {len(pairs)} examples have no hard "
            "negative, so that their loss is always 0: raise it, or give each of them a negative"
        )
    return ContrastiveStage(
        model,
        pairs.__getitem__,
        SourceBatches(tuple(pairs.group_sizes.values()), global_batch_size, seed, sampling_temperature),
        config,
        held_out_pairs,
        data_fingerprint=pairs.fingerprint,
        seed=seed,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
    )
