"""Supervised contrastive learning on queries, positives and hard negatives. A batch comes from one source."""

from __future__ import annotations

import logging

import numpy as np

from llm2vec_ds.data.pairs import PreparedPairs, find_pair_sources
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.base import Parts, Rows
from llm2vec_ds.objectives.contrastive.guide import GuideVectors, wanted_of_guide
from llm2vec_ds.objectives.contrastive.objective import (
    ContrastiveObjective,
    ContrastiveStage,
    Sources,
    contrastive_model,
    section_of,
)
from llm2vec_ds.objectives.teacher_vectors import TeacherVectors, keep_vectors
from llm2vec_ds.recipe.objectives import SupervisedConfig
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)


class Supervised(ContrastiveObjective):
    """Trains each query against all positives and hard negatives of the batch (arXiv 2404.05961, section 4).

    There are two exceptions: sources without in-batch negatives, and documents that a guide leaves out.
    """

    section = SupervisedConfig

    def prepare(self, recipe: Recipe) -> None:
        for wanted in wanted_of_guide(recipe):
            keep_vectors(wanted)

    def data_fingerprint(self, recipe: Recipe, training: Rows) -> str:
        assert isinstance(training, PreparedPairs)
        sources = _sources(recipe, recipe.data.path, training)
        alone = [name for name, alone in zip(sources.names, sources.alone, strict=True) if alone]
        parts = [training.fingerprint, *(["alone", *alone] if alone else [])]
        guides = [TeacherVectors(wanted.folder).fingerprint[:16] for wanted in wanted_of_guide(recipe)]
        return "-".join([*parts, *guides])

    def build(self, parts: Parts) -> ContrastiveStage:
        """See `Objective.build`.

        Raises:
            UserError: also if an example would have no negative.
        """
        recipe, pairs = parts.recipe, parts.training
        assert isinstance(pairs, PreparedPairs)
        assert not isinstance(parts.held_out, PreparedTexts)
        assert recipe.data.pairs is not None
        log.info("supervised: %s", ", ".join(f"{n} {size}" for n, size in pairs.group_sizes.items()))
        batch_size = recipe.batch.global_batch_size
        if batch_size == 1 and (n_without := sum(pairs.n_without_negatives)):
            raise UserError(
                f"batch.global_batch_size=1: {n_without} of {len(pairs)} examples have no hard negative, so "
                "their loss is always 0: raise batch.global_batch_size, or give each example a negative"
            )
        sources = _sources(recipe, recipe.data.path, pairs)
        _check_own_negatives(recipe, sources, pairs)
        held_out_path, held_out_sources = recipe.data.held_out_path, None
        if parts.held_out is not None and held_out_path is not None:
            held_out_sources = _sources(recipe, held_out_path, parts.held_out)
        has_guide = bool(wanted_of_guide(recipe))
        return ContrastiveStage(
            contrastive_model(parts),
            lambda rows, _: pairs[rows],
            pairs.batches(recipe),
            section_of(recipe),
            parts.held_out,
            sources=sources,
            held_out_sources=held_out_sources,
            guide=GuideVectors(recipe, pairs) if has_guide else None,
            data_fingerprint=self.data_fingerprint(recipe, pairs),
            seed=recipe.seed,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
        )


def _sources(recipe: Recipe, path: str | list[str], pairs: PreparedPairs) -> Sources:
    found = find_pair_sources(recipe.data, path)
    alone = np.array([not source.given.in_batch_negatives for source in found])
    return Sources([source.name for source in found], alone, pairs.sources_of)


def _check_own_negatives(recipe: Recipe, sources: Sources, pairs: PreparedPairs) -> None:
    """Raises UserError if a source has no in-batch negatives and an example has no hard negative either."""
    assert recipe.data.pairs is not None
    of_sources = zip(sources.names, sources.alone, pairs.n_without_negatives, pairs.source_sizes, strict=True)
    for name, alone, n_without, size in of_sources:
        if alone and n_without:
            raise UserError(
                f"{recipe.data.pairs.instructions}: `{name}` has in_batch_negatives: false, and {n_without} "
                f"of its {size} examples have no hard negative, so their loss is always 0: give each one "
                "(data.pairs.negative_column, data.pairs.max_negatives), or remove in_batch_negatives"
            )
        if alone:
            log.info("%s: each query is compared with its own hard negatives only", name)
