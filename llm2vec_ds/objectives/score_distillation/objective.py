"""Distillation from scores: an encoder learns to rank a query's documents as a judge does."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import rank_slice
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank, world_size
from llm2vec_ds.objectives.base import (
    Backward,
    Forward,
    Objective,
    Parts,
    PlannedWork,
    Rows,
    StepResult,
    dropout_seed,
    equal_count,
)
from llm2vec_ds.objectives.embedding_cache import ScaledEncoder, vectors_loss_backward
from llm2vec_ds.objectives.packed_examples import PackedExamples
from llm2vec_ds.objectives.score_distillation.loss import ScoreLoss
from llm2vec_ds.objectives.score_distillation.score_table import (
    ScoreTable,
    prepare_scores,
    score_folder,
    section_of,
)
from llm2vec_ds.objectives.spread import are_alike, spread
from llm2vec_ds.recipe.objectives import DistilScoresConfig
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)


class ScoreDistillation(Objective):
    """Trains the encoder on a judge's scores of each query's documents."""

    section = DistilScoresConfig

    def prepare(self, recipe: Recipe) -> None:
        for path in (recipe.data.path, recipe.data.held_out_path):
            if path is not None:
                prepare_scores(recipe, path)

    def data_fingerprint(self, recipe: Recipe, training: Rows) -> str:
        scores = ScoreTable(score_folder(recipe, recipe.data.path))
        return f"{training.fingerprint}-{scores.fingerprint[:16]}"

    def build(self, parts: Parts) -> ScoreStage:
        recipe, pairs = parts.recipe, parts.training
        assert isinstance(pairs, PreparedPairs)
        assert not isinstance(parts.held_out, PreparedTexts)
        log.info("scores: %s", ", ".join(f"{name} {size}" for name, size in pairs.group_sizes.items()))
        return ScoreStage(parts, pairs, parts.held_out, data_fingerprint=self.data_fingerprint(recipe, pairs))

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        assert recipe.data.pairs is not None
        texts = 2 + recipe.data.pairs.max_negatives
        return PlannedWork(texts_per_row=texts, embedding_cache=True, follows_another=True)


class ScoredExamples:
    """A rank's examples as packed micro-batches, with the judge's scores of their documents, on the CPU."""

    def __init__(
        self,
        examples: list[list[TokenizedText]],
        table: ScoreTable,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.packed = PackedExamples(examples, max_tokens, device)
        n = self.packed.n_queries
        ids = self.packed.ids.numpy()
        self.query_of_R = torch.from_numpy(self.packed.example_of[n:].copy())
        self.score_R = table(ids[:n][self.query_of_R.numpy()], ids[n:])


class ScoreStage:
    """Trains on the `ScoreLoss` of each query, averaged over the global batch."""

    def __init__(
        self,
        parts: Parts,
        pairs: PreparedPairs,
        held_out_pairs: PreparedPairs | None,
        *,
        data_fingerprint: str,
    ) -> None:
        recipe = parts.recipe
        assert recipe.data.pairs is not None
        self.pairs, self.held_out_pairs, self.data_fingerprint = pairs, held_out_pairs, data_fingerprint
        self.encoder = parts.encoder
        self.model = ScaledEncoder(parts.encoder)  # `ScoreLoss` applies the scale itself
        self.loss = ScoreLoss(section_of(recipe))
        self.table = ScoreTable(score_folder(recipe, recipe.data.path))
        held_out_path = recipe.data.held_out_path
        self.held_out_table = ScoreTable(score_folder(recipe, held_out_path)) if held_out_path else None
        self.seed, self.micro_batch_tokens = recipe.seed, recipe.batch.micro_batch_tokens
        self.global_batch = pairs.batches(recipe)

    def text(self, row: int) -> TokenizedText:
        (example,) = self.pairs[[row]]
        return example[0]

    def batches(self, step: int, rows: np.ndarray) -> ScoredExamples:
        return ScoredExamples(self.pairs[rows], self.table, self.micro_batch_tokens, self.encoder.device)

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        return pack(texts)

    def step(
        self, step: int, rows: np.ndarray, batches: ScoredExamples, forward: Forward, backward: Backward
    ) -> StepResult:
        device, packed = self.encoder.device, batches.packed
        n_passes = equal_count(packed.groups, device)
        n_global = all_reduce_sum(torch.tensor(float(len(rows)), device=device))
        n_hits = torch.zeros((), device=device)

        def loss_share(vectors: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            total, hits = self._loss(vectors, batches)
            n_hits.copy_(hits)
            return total / n_global

        vectors, share = vectors_loss_backward(
            forward,
            [batch.to(device) for batch in packed.batches],
            [dropout_seed(self.seed, step, rank(), index) for index in range(n_passes)],
            loss_share,
            lambda scalar, index, last: backward(scalar, rows=packed.rows(rows, index), last=last),
            n_passes=n_passes,
        )
        own = torch.stack([share, n_hits / n_global])
        sums = all_reduce_sum(torch.cat([own, spread(vectors, packed.n_distinct)]))
        loss, accuracy, *distance = sums.tolist()
        return StepResult(
            loss=loss,
            n_tokens=sum(batch.n_tokens for batch in packed.batches),
            metrics={"accuracy": accuracy},
            bad_rows=lambda: packed.not_finite(rows, vectors),
            vectors_alike=are_alike(*distance),
        )

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Returns the loss, and the share of queries whose best document is also the judge's best."""
        if self.held_out_pairs is None or self.held_out_table is None:
            return None
        rows = rank_slice(np.arange(len(self.held_out_pairs)), rank(), world_size())
        pairs, table, device = self.held_out_pairs[rows], self.held_out_table, self.encoder.device
        examples = ScoredExamples(pairs, table, self.micro_batch_tokens, device)
        batches, cached = examples.packed.batches, []
        for index in range(equal_count(examples.packed.groups, device)):
            vectors, _ = forward(batches[min(index, len(batches) - 1)].to(device))
            cached += [vectors] if index < len(batches) else []
        total, hits = self._loss(torch.cat(cached), examples)
        loss, n_hits = all_reduce_sum(torch.stack([total, hits.to(total)])).tolist()
        n_queries = len(self.held_out_pairs)
        return {"loss": loss / n_queries, "accuracy": n_hits / n_queries, "n_queries": float(n_queries)}

    def _loss(self, vectors: torch.Tensor, batches: ScoredExamples) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns summed loss and hits, from vectors in the order of the micro-batches."""
        query_QD, document_RD = batches.packed.in_order(vectors).tensor_split([batches.packed.n_queries])
        device = vectors.device
        return self.loss(query_QD, document_RD, batches.query_of_R.to(device), batches.score_R.to(device))
