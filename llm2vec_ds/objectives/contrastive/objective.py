"""What SimCSE and the supervised stage have in common: examples of texts → one InfoNCE over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import GlobalBatches, rank_slice
from llm2vec_ds.data.packing import pack, plan_micro_batches
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
from llm2vec_ds.objectives.contrastive.embedding_cache import ContrastiveModel, vectors_loss_backward
from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors, check_widths
from llm2vec_ds.objectives.spread import are_alike, spread
from llm2vec_ds.recipe.objectives import ContrastiveConfig
from llm2vec_ds.recipe.recipe import Recipe

Examples = Callable[[Sequence[int] | np.ndarray], list[list[TokenizedText]]]
"""Rows → the texts of each: query, positive, hard negatives."""


class ContrastiveObjective(Objective):
    """What SimCSE and the supervised stage have in common."""

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        config = section_of(recipe)
        pairs = recipe.data.pairs
        documents = 1 + (pairs.max_negatives if pairs is not None else 0)
        return PlannedWork(
            texts_per_row=1 + documents,
            documents_per_row=documents,
            exchange=config.exchange,
            bytes_per_number=2 if config.exchange_precision == "bf16" else 4,
            trainable=(torch.Size([1]),) if config.learn_scale else (),
            follows_another=True,
        )


def section_of(recipe: Recipe) -> ContrastiveConfig:
    assert isinstance(recipe.objective, ContrastiveConfig)
    return recipe.objective


def contrastive_model(parts: Parts) -> ContrastiveModel:
    """Raises UserError where Matryoshka lengths exceed the model's width."""
    config = section_of(parts.recipe)
    if mistake := check_widths(config.matryoshka_dims, parts.encoder.trunk.config.hidden_size):
        raise UserError(mistake)
    return ContrastiveModel(parts.encoder, config)


class ContrastiveStage:
    """Loss: InfoNCE of each query's positive, averaged over the global batch."""

    def __init__(
        self,
        model: ContrastiveModel,
        examples: Examples,
        global_batch: GlobalBatches,
        config: ContrastiveConfig,
        held_out_pairs: PreparedPairs | None = None,
        *,
        data_fingerprint: str,
        seed: int,
        micro_batch_tokens: int,
    ) -> None:
        self.model = model
        self.encoder = model.encoder
        self.examples = examples
        self.data_fingerprint = data_fingerprint
        self.global_batch = global_batch
        self.held_out_pairs = held_out_pairs
        self.loss = ContrastiveLoss(config)
        self.seed = seed
        self.micro_batch_tokens = micro_batch_tokens

    def text(self, row: int) -> TokenizedText:
        (example,) = self.examples([row])
        return example[0]

    def batches(self, step: int, rows: np.ndarray) -> PackedExamples:
        return PackedExamples(self.examples(rows), self.micro_batch_tokens, self.encoder.device)

    def step(
        self, step: int, rows: np.ndarray, batches: PackedExamples, forward: Forward, backward: Backward
    ) -> StepResult:
        device, packed = self.encoder.device, batches
        n_passes = equal_count(packed.groups, device)
        n_hits = torch.zeros((), device=device)
        last_scale = torch.zeros((), device=device)

        def loss_share(vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            share, hits = self.loss(packed.pair_vectors(vectors), scale)
            n_hits.copy_(hits)
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
            metrics={"accuracy": hits / n_global, "scale": float(last_scale)},
            bad_rows=lambda: packed.not_finite(rows, vectors),
            vectors_alike=are_alike(*distance),
        )

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        return pack(texts)

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Loss and accuracy of the held-out queries, all held-out documents being candidates."""
        if self.held_out_pairs is None:
            return None
        return held_out_metrics(
            self.held_out_pairs, self.loss, forward, self.micro_batch_tokens, self.encoder.device
        )


class PackedExamples:
    """A rank's examples as packed micro-batches, and the way back from their vectors to the examples."""

    def __init__(self, examples: list[list[TokenizedText]], max_tokens: int, device: torch.device) -> None:
        negatives = [text for example in examples for text in example[2:]]
        texts = [example[0] for example in examples] + [example[1] for example in examples] + negatives
        self.n_queries = len(examples)
        own = np.arange(self.n_queries)
        counts = [len(example) - 2 for example in examples]
        self.example_of = np.concatenate([own, own, np.repeat(own, counts)])
        self.groups = plan_micro_batches([len(text) for text in texts], max_tokens)
        self.batches = [pack([texts[i] for i in group]).ready_for(device) for group in self.groups]
        self.order = np.concatenate(self.groups)
        self.ids = torch.tensor([text.text_hash for text in texts], dtype=torch.int64)
        self.n_distinct = len({text.text_hash for text in texts})

    def pair_vectors(self, vectors: torch.Tensor) -> PairVectors:
        """From vectors in the order of the micro-batches."""
        place = torch.from_numpy(np.argsort(self.order)).to(vectors.device)
        query, positive, negative = vectors[place].tensor_split([self.n_queries, 2 * self.n_queries])
        ids = self.ids.to(vectors.device)
        return PairVectors(query, positive, negative, *ids.tensor_split([self.n_queries, 2 * self.n_queries]))

    def rows(self, rows: np.ndarray, group: int) -> list[int]:
        """Which of `rows` have a text in a micro-batch."""
        return rows[np.unique(self.example_of[self.groups[group]])].tolist()

    def not_finite(self, rows: np.ndarray, vectors: torch.Tensor) -> list[int]:
        """Which of `rows` have a vector with a NaN or an infinity."""
        bad = ~vectors.isfinite().all(-1).cpu().numpy()
        return rows[np.unique(self.example_of[self.order[bad]])].tolist()


def held_out_metrics(
    pairs: PreparedPairs, loss: ContrastiveLoss, forward: Forward, max_tokens: int, device: torch.device
) -> dict[str, float]:
    """`loss` and `accuracy` over all of `pairs`, shared among ranks."""
    rows = rank_slice(np.arange(len(pairs)), rank(), world_size())
    packed = PackedExamples(pairs[rows], max_tokens, device)
    cached = []
    for index in range(equal_count(packed.groups, device)):
        vectors, scale = forward(packed.batches[min(index, len(packed.batches) - 1)].to(device))
        if index < len(packed.batches):
            cached.append(vectors)
    share, hits = loss(packed.pair_vectors(torch.cat(cached)), scale)
    total, n_hits = all_reduce_sum(torch.stack([share, hits.to(share)])).tolist()
    return {"loss": total, "accuracy": n_hits / len(pairs), "n_queries": float(len(pairs))}
