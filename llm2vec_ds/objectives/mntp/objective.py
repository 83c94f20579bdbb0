"""Masked next token prediction on packed texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import EpochBatches, rank_slice
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank, world_size
from llm2vec_ds.model.damage import check_ids
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
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead, MntpModel
from llm2vec_ds.objectives.mntp.masking import Masking
from llm2vec_ds.recipe.objectives import MntpConfig
from llm2vec_ds.recipe.recipe import Recipe

HELD_OUT_STEP = 2**32
"""The `step` that seeds the masks of held-out texts: the same at every evaluation, and no training step."""


MaskedBatches = tuple[list[PackedBatch], list[np.ndarray]]
"""Packed micro-batches with labels, and the row numbers of each."""


class Mntp(Objective):
    """The hidden state at i−1 predicts the masked token at i (arXiv 2404.05961, section 2.1)."""

    section = MntpConfig
    uses_language_head = True

    def build(self, parts: Parts) -> MntpStage:
        config, encoder, recipe = _section(parts.recipe), parts.encoder, parts.recipe
        linear = parts.language_head
        assert linear is not None
        assert isinstance(parts.training, PreparedTexts)
        assert not isinstance(parts.held_out, PreparedPairs)
        masking = Masking.for_tokenizer(encoder.tokenizer, config)
        check_ids(masking.largest_id, encoder.trunk)
        if recipe.adapter is not None:
            linear.requires_grad_(False)  # only adapters train; an untied head would train for nothing
        head = MaskedTokenHead(linear, encoder.trunk.config, config.head_chunk_tokens)
        return MntpStage(
            MntpModel(encoder, head),
            parts.training,
            parts.held_out,
            masking,
            seed=recipe.seed,
            global_batch_size=recipe.batch.global_batch_size,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
        )

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        return PlannedWork(head_rows_per_token=sum(_section(recipe).mask_rates) / 2)

    def planned_head(self, language_head: nn.Linear | None, config: Any, recipe: Recipe) -> nn.Module:
        assert language_head is not None
        return MaskedTokenHead(language_head, config, _section(recipe).head_chunk_tokens)

    def planned_outcome(
        self, hidden_TD: torch.Tensor, batch: PackedBatch, head: nn.Module | None, recipe: Recipe
    ) -> torch.Tensor:
        assert head is not None
        n_masked = max(1, round(max(_section(recipe).mask_rates) * len(hidden_TD)))
        index_M = torch.empty(n_masked, dtype=torch.int64, device=hidden_TD.device)
        loss_M: torch.Tensor = head(hidden_TD[index_M], index_M)[0]
        return loss_M


def _section(recipe: Recipe) -> MntpConfig:
    assert isinstance(recipe.objective, MntpConfig)
    return recipe.objective


class MntpStage:
    """Trains on the cross-entropy, averaged over the masked tokens of all ranks."""

    def __init__(
        self,
        model: MntpModel,
        texts: PreparedTexts,
        held_out_texts: PreparedTexts | None,
        masking: Masking,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_tokens: int,
    ) -> None:
        self.model = model
        self.encoder = model.encoder
        self.texts = texts
        self.data_fingerprint = texts.fingerprint
        self.global_batch = EpochBatches(len(texts), global_batch_size, seed)
        self.held_out_texts = held_out_texts
        self.masking = masking
        self.seed = seed
        self.micro_batch_tokens = micro_batch_tokens

    def text(self, row: int) -> TokenizedText:
        (text,) = self.texts[[row]]
        return text

    def batches(self, step: int, rows: np.ndarray) -> MaskedBatches:
        return self._masked_batches(self.texts, rows, step)

    def step(
        self, step: int, rows: np.ndarray, batches: MaskedBatches, forward: Forward, backward: Backward
    ) -> StepResult:
        packed, groups = batches
        device = self.encoder.device
        n_masked = sum(_n_masked(batch) for batch in packed)
        n_masked_global = all_reduce_sum(torch.tensor(float(n_masked), device=device)).clamp(min=1.0)
        n_passes = equal_count(groups, device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        losses: list[torch.Tensor] = []
        for index in range(n_passes):
            own = index < len(packed)
            batch, group = (packed[index], groups[index]) if own else (packed[0], groups[0])
            torch.manual_seed(dropout_seed(self.seed, step, rank(), index))
            loss_M, hit_M = forward(batch.to(device))
            share = loss_M.sum() / n_masked_global
            backward(share if own else share * 0, rows=group.tolist(), last=index == n_passes - 1)
            if own:
                losses.append(loss_M.detach())
                sums += torch.stack([loss_M.detach().sum(), hit_M.sum()])
        loss, accuracy = (all_reduce_sum(sums) / n_masked_global).tolist()
        n_tokens = sum(batch.n_tokens for batch in packed)
        return StepResult(
            loss, n_tokens, {"accuracy": accuracy}, lambda: _rows_not_finite(packed, groups, losses)
        )

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        """Labels every token, which is the most that the head can have to compute."""
        return pack(texts, [np.asarray(text.input_ids) for text in texts])

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        if self.held_out_texts is None:
            return None
        rows = rank_slice(np.arange(len(self.held_out_texts)), rank(), world_size())
        batches, groups = self._masked_batches(self.held_out_texts, rows, HELD_OUT_STEP)
        device = self.encoder.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for index in range(equal_count(groups, device)):
            loss_M, hit_M = forward(batches[min(index, len(batches) - 1)].to(device))
            if index < len(batches):
                sums += torch.stack([loss_M.sum(), hit_M.sum(), torch.tensor(len(loss_M), device=device)])
        loss, hits, count = all_reduce_sum(sums).tolist()
        return {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "n_masked": count}

    def _masked_batches(self, texts: PreparedTexts, rows: np.ndarray, step: int) -> MaskedBatches:
        batches, groups = [], []
        for group in plan_micro_batches(texts.lengths[rows], self.micro_batch_tokens):
            own_rows = rows[group]
            masked, labels = self._mask(texts[own_rows], own_rows, step)
            batches.append(pack(masked, labels).ready_for(self.encoder.device))
            groups.append(own_rows)
        return batches, groups

    def _mask(
        self, texts: Sequence[TokenizedText], rows: np.ndarray, step: int
    ) -> tuple[list[TokenizedText], list[np.ndarray]]:
        masked, labels = [], []
        for text, row in zip(texts, rows, strict=True):
            ids, label = self.masking(np.asarray(text.input_ids), seed=self.seed, step=step, row=int(row))
            masked.append(TokenizedText(ids, text.pool_start, text.pool_end, text.text_hash))  # type: ignore[arg-type]
            labels.append(label)
        return masked, labels


def _n_masked(batch: PackedBatch) -> int:
    assert batch.predicted is not None
    return len(batch.predicted)


def _rows_not_finite(
    packed: Sequence[PackedBatch], groups: Sequence[np.ndarray], losses: Sequence[torch.Tensor]
) -> list[int]:
    """Returns the rows of texts in which a masked token's loss is NaN or infinite."""
    rows: list[int] = []
    for batch, group, loss_M in zip(packed, groups, losses, strict=True):
        assert batch.predicted is not None
        token = batch.predicted[~loss_M.isfinite().cpu()]
        text = torch.searchsorted(batch.cu_seqlens, token, right=True, out_int32=True) - 1
        rows += group[np.unique(text.numpy())].tolist()
    return rows
