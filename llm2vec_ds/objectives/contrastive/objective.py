"""The shared part of SimCSE and the supervised stage: one InfoNCE loss of examples over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import GlobalBatches, rank_slice
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank, world_size
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.base import (
    Backward,
    Forward,
    Objective,
    Parts,
    PlannedWork,
    StepResult,
    dropout_seed,
    equal_count,
)
from llm2vec_ds.objectives.contrastive.guide import GuideVectors, Tally
from llm2vec_ds.objectives.contrastive.info_nce import (
    ContrastiveLoss,
    OwnNegatives,
    PairGuide,
    PairVectors,
    check_widths,
)
from llm2vec_ds.objectives.embedding_cache import ScaledEncoder, vectors_loss_backward
from llm2vec_ds.objectives.packed_examples import PackedExamples
from llm2vec_ds.objectives.spread import are_alike, spread
from llm2vec_ds.recipe.objectives import ContrastiveConfig
from llm2vec_ds.recipe.recipe import Recipe

Examples = Callable[[Sequence[int] | np.ndarray, int], list[list[TokenizedText]]]
"""Maps row numbers and a step to each row's texts in this step: query, positive, hard negatives."""


@dataclass(frozen=True)
class Sources:
    """The sources that examples come from.

    Attributes:
        names: names of all sources.
        alone: for each source, whether its queries are compared with their own hard negatives only (bool).
        of: maps row numbers to the numbers of their sources.
    """

    names: list[str]
    alone: np.ndarray
    of: Callable[[np.ndarray], np.ndarray]


class ContrastiveObjective(Objective):
    """The shared part of SimCSE and the supervised stage."""

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        config = section_of(recipe)
        pairs = recipe.data.pairs
        documents = 1 + (pairs.max_negatives if pairs is not None else 0)
        rounds_of_queries = config.symmetric + config.between_queries
        return PlannedWork(
            texts_per_row=1 + documents,
            embedding_cache=True,
            documents_per_row=documents + (rounds_of_queries > 0),
            rounds_again_per_row=documents * config.between_documents + (rounds_of_queries == 2),
            exchange=config.exchange,
            bytes_per_number=2 if config.exchange_precision == "bf16" else 4,
            trainable=(torch.Size([1]),) if config.learn_scale else (),
            follows_another=True,
        )


def section_of(recipe: Recipe) -> ContrastiveConfig:
    assert isinstance(recipe.objective, ContrastiveConfig)
    return recipe.objective


def contrastive_model(parts: Parts) -> ScaledEncoder:
    """Builds the model. Raises UserError if a Matryoshka length is larger than the model's width."""
    config = section_of(parts.recipe)
    if mistake := check_widths(config.matryoshka_dims, parts.encoder.trunk.config.hidden_size):
        raise UserError(mistake)
    return ScaledEncoder(parts.encoder, config.scale, learn_scale=config.learn_scale)


class ContrastiveStage:
    """Trains on the InfoNCE of each query's positive, averaged over the global batch.

    A guide acts in training only. Held-out metrics do not use it.
    """

    def __init__(
        self,
        model: ScaledEncoder,
        examples: Examples,
        global_batch: GlobalBatches,
        config: ContrastiveConfig,
        held_out_pairs: PreparedPairs | None = None,
        *,
        sources: Sources | None = None,
        held_out_sources: Sources | None = None,
        guide: GuideVectors | None = None,
        data_fingerprint: str,
        seed: int,
        micro_batch_tokens: int,
    ) -> None:
        self.model = model
        self.encoder = model.encoder
        self.examples = examples
        self.data_fingerprint = data_fingerprint
        self.global_batch = global_batch
        self.held_out_pairs, self.held_out_sources = held_out_pairs, held_out_sources
        self.sources, self.guide = sources, guide
        self.tally = Tally(sources.names) if guide is not None and sources is not None else None
        self.loss = ContrastiveLoss(config)
        self.seed = seed
        self.micro_batch_tokens = micro_batch_tokens

    def text(self, row: int) -> TokenizedText:
        (example,) = self.examples([row], 0)
        return example[0]

    def batches(self, step: int, rows: np.ndarray) -> PairedExamples:
        return PairedExamples(
            self.examples(rows, step),
            self.micro_batch_tokens,
            self.encoder.device,
            sources=self.sources,
            rows=rows,
            guide=self.guide,
        )

    def step(
        self, step: int, rows: np.ndarray, batches: PairedExamples, forward: Forward, backward: Backward
    ) -> StepResult:
        device, packed = self.encoder.device, batches
        n_passes = equal_count(packed.groups, device)
        n_hits = torch.zeros((), device=device)
        last_scale = torch.zeros((), device=device)
        n_guided_Q = torch.zeros(len(rows), device=device)

        def loss_share(vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            share, hits, guided_Q = self.loss(packed.pair_vectors(vectors), scale)
            n_hits.copy_(hits)
            n_guided_Q.copy_(guided_Q)
            last_scale.copy_(scale.detach())
            return share

        vectors, share = vectors_loss_backward(
            forward,
            [batch.to(device) for batch in packed.batches],
            [dropout_seed(self.seed, step, rank(), index) for index in range(n_passes)],
            loss_share,
            lambda scalar, index, last: backward(scalar, rows=packed.rows(rows, index), last=last),
            n_passes=n_passes,
        )
        n_queries = torch.tensor(float(len(rows)), device=device)
        own = torch.stack([share, n_hits, n_queries])
        sums = all_reduce_sum(torch.cat([own, spread(vectors, packed.n_distinct)]))
        loss, hits, n_global, *distance = sums.tolist()
        return StepResult(
            loss=loss,
            n_tokens=sum(batch.n_tokens for batch in packed.batches),
            metrics={"accuracy": hits / n_global, "scale": float(last_scale)}
            | self._guided(packed, n_guided_Q),
            bad_rows=lambda: packed.not_finite(rows, vectors),
            vectors_alike=are_alike(*distance),
        )

    def _guided(self, packed: PairedExamples, guided_Q: torch.Tensor) -> dict[str, float]:
        """Returns metrics of the negatives that the guide left out, by source."""
        if self.tally is None or packed.source_Q is None:
            return {}
        counts = torch.tensor([packed.n_queries, packed.n_documents], device=guided_Q.device)
        other_queries, other_documents = (all_reduce_sum(counts.float()) - 1).unbind()
        config = self.loss.config
        n_others = other_documents * (1 + config.between_documents) + other_queries * config.between_queries
        others_Q = n_others.expand(len(guided_Q))
        if packed.own is not None:
            own_Q = torch.bincount(packed.own.query_of_M, minlength=len(guided_Q)).to(others_Q)
            others_Q = torch.where(packed.own.alone_Q.to(guided_Q.device), own_Q, others_Q)
        return self.tally.add(packed.source_Q.to(guided_Q.device), guided_Q, others_Q)

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        return pack(texts)

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Returns loss and accuracy of the held-out queries against all held-out documents."""
        if self.held_out_pairs is None:
            return None
        return held_out_metrics(
            self.held_out_pairs,
            self.held_out_sources,
            self.loss,
            forward,
            self.micro_batch_tokens,
            self.encoder.device,
        )


class PairedExamples(PackedExamples):
    """Packed examples with what the contrastive loss needs besides vectors: sources and a guide's vectors."""

    def __init__(
        self,
        examples: list[list[TokenizedText]],
        max_tokens: int,
        device: torch.device,
        *,
        sources: Sources | None = None,
        rows: np.ndarray | None = None,
        guide: GuideVectors | None = None,
    ) -> None:
        """`rows`: the examples' row numbers, needed if `sources` is given."""
        super().__init__(examples, max_tokens, device)
        self.source_Q: torch.Tensor | None = None
        self.own: OwnNegatives | None = None
        if sources is not None and rows is not None:
            source_Q = sources.of(rows)
            self.source_Q = torch.from_numpy(source_Q)
            if sources.alone.any():
                query_of_M = torch.from_numpy(self.example_of[2 * self.n_queries :].copy())
                self.own = OwnNegatives(torch.from_numpy(sources.alone[source_Q]), query_of_M)
        self.guide: PairGuide | None = guide(examples) if guide is not None else None

    def pair_vectors(self, vectors: torch.Tensor) -> PairVectors:
        """Splits vectors, in the order of the micro-batches, into queries, positives and negatives."""
        device, ends = vectors.device, [self.n_queries, 2 * self.n_queries]
        query, positive, negative = self.in_order(vectors).tensor_split(ends)
        guide = PairGuide(*(x.to(device) for x in self.guide)) if self.guide is not None else None
        own = OwnNegatives(*(x.to(device) for x in self.own)) if self.own is not None else None
        query_id, positive_id, negative_id = self.ids.to(device).tensor_split(ends)
        return PairVectors(query, positive, negative, query_id, positive_id, negative_id, guide, own)


def held_out_metrics(
    pairs: PreparedPairs,
    sources: Sources | None,
    loss: ContrastiveLoss,
    forward: Forward,
    max_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Returns `loss` and `accuracy` over all of `pairs`. The ranks share the pairs."""
    rows = rank_slice(np.arange(len(pairs)), rank(), world_size())
    packed = PairedExamples(pairs[rows], max_tokens, device, sources=sources, rows=rows)
    cached = []
    for index in range(equal_count(packed.groups, device)):
        vectors, scale = forward(packed.batches[min(index, len(packed.batches) - 1)].to(device))
        if index < len(packed.batches):
            cached.append(vectors)
    share, hits, _ = loss(packed.pair_vectors(torch.cat(cached)), scale)
    total, n_hits = all_reduce_sum(torch.stack([share, hits.to(share)])).tolist()
    return {"loss": total, "accuracy": n_hits / len(pairs), "n_queries": float(len(pairs))}
