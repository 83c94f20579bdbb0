"""A guide's vectors of examples, and a tally of the negatives that it leaves out.

`texts.Limits` decides which negatives those are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from llm2vec_ds.data.pairs import PreparedPairs, find_pair_sources
from llm2vec_ds.data.prepared_folder import prepared_root
from llm2vec_ds.data.prompts import Prompt, TokenizedText
from llm2vec_ds.data.sources import find_source, stream_pairs
from llm2vec_ds.distributed import all_reduce_sum
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.contrastive.info_nce import PairGuide
from llm2vec_ds.objectives.teacher_vectors import TeacherVectors, VectorRequest, limit_of
from llm2vec_ds.recipe.objectives import SupervisedConfig
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)

QUERIES, DOCUMENTS = "queries", "documents"


def wanted_of_guide(recipe: Recipe) -> list[VectorRequest]:
    """Returns which vectors of the guide the recipe needs: queries', then documents'; [] without a guide."""
    config = recipe.objective
    assert isinstance(config, SupervisedConfig)
    if config.guide is None:
        return []
    prompts = {QUERIES: config.guide_query_prompt, DOCUMENTS: config.guide_document_prompt}
    return [_wanted(recipe, config.guide, role, prompt) for role, prompt in prompts.items()]


def _wanted(recipe: Recipe, guide: str, role: str, prompt: str | None) -> VectorRequest:
    data, pairs = recipe.data, recipe.data.pairs
    assert pairs is not None

    def texts() -> Iterator[tuple[int, str]]:
        for source in find_pair_sources(data, data.path):
            given = source.instructions
            found = stream_pairs(find_source(source.path), pairs, Counter(), bad_rows=data.bad_rows)
            for query, *documents in islice(found, data.max_texts):
                own = [query] if role == QUERIES else documents
                instruction = given.query if role == QUERIES else given.document
                yield from ((Prompt(instruction, text).hash(), text) for text in own if text.strip())

    instructions = [
        [source.name, source.instructions.query, source.instructions.document]
        for source in find_pair_sources(data, data.path)
    ]
    columns = pairs.model_dump(exclude={"instructions", "positives", "sampling_temperature"})
    identity = [find_source(data.path).identity(), columns, instructions, role, *limit_of(data)]
    return VectorRequest(guide, f"{recipe.stage}.guide", prompt, texts, identity, prepared_root(data))


class GuideVectors:
    """The guide's vectors of the training data, memory-mapped."""

    def __init__(self, recipe: Recipe, pairs: PreparedPairs) -> None:
        """Raises UserError if a text of `pairs` has no vector."""
        wanted = wanted_of_guide(recipe)
        self.queries, self.documents = (TeacherVectors(each.folder) for each in wanted)
        for vectors, hashes, role in zip(
            (self.queries, self.documents), pairs.text_hashes(), (QUERIES, DOCUMENTS), strict=True
        ):
            known = vectors.known(hashes)
            if not known.all():
                raise UserError(
                    f"{wanted[0].key} has no vector for {np.count_nonzero(~known)} of the {len(known)} "
                    f"{role} of data.path: encode these texts with the guide, or set {wanted[0].key} "
                    "to a model"
                )

    def __call__(self, examples: Sequence[Sequence[TokenizedText]]) -> PairGuide:
        """Returns the vectors of queries, positives and hard negatives, example by example, on the CPU."""
        parts = (
            (self.queries, [example[0] for example in examples]),
            (self.documents, [example[1] for example in examples]),
            (self.documents, [text for example in examples for text in example[2:]]),
        )
        found = (
            vectors[np.array([text.text_hash for text in texts], dtype=np.int64)] for vectors, texts in parts
        )
        return PairGuide(*(self._unit(vectors) for vectors in found))

    def _unit(self, vectors: torch.Tensor) -> torch.Tensor:
        if not bool(vectors.isfinite().all()):
            raise UserError("the guide's vectors hold a NaN or an infinity: encode its texts again")
        return F.normalize(vectors, dim=-1)


class Tally:
    """Counts the negatives that the guide has left out of each source, since this process began."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.total = np.zeros((2, len(self.names)))
        self.n_steps = 0

    def add(self, source_Q: torch.Tensor, guided_Q: torch.Tensor, others_Q: torch.Tensor) -> dict[str, float]:
        """Adds one step, and returns its metrics for the sources in it. All ranks call this together.

        Args:
            source_Q: the number of each query's source.
            guided_Q: how many documents the guide leaves out for each query.
            others_Q: how many documents each query has besides its own positive.
        """
        own = torch.zeros(2, len(self.names), dtype=torch.float64, device=guided_Q.device)
        own.index_add_(1, source_Q, torch.stack([guided_Q, others_Q]).double())
        step = all_reduce_sum(own).cpu().numpy()
        self.total += step
        self.n_steps += 1
        if self.n_steps & (self.n_steps - 1) == 0:  # at powers of two, so that even a long run logs few lines
            log.info("in %s step(s) the guide has left out: %s", self.n_steps, self._shown())
        metrics: dict[str, float] = {}
        for name, out, others in zip(self.names, *step.tolist(), strict=True):
            if others:
                metrics |= {f"guided_out/{name}": out, f"negatives/{name}": others}
        return metrics

    def _shown(self) -> str:
        shown = (
            f"{out:.0f} of {others:.0f} negatives of {name} ({out / others:.1%})"
            for name, out, others in zip(self.names, *self.total.tolist(), strict=True)
            if others
        )
        return ", ".join(shown) or "nothing, because there were no negatives"
