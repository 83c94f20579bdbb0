"""The MNTP stage: masked next token prediction on packed texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import EpochBatches, rank_slice
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank, world_size
from llm2vec_ds.objectives.base import Backward, Forward, StepResult, dropout_seed, equal_count
from llm2vec_ds.objectives.mntp.head import MntpModel
from llm2vec_ds.objectives.mntp.masking import NOT_PREDICTED, Masking

HELD_OUT_STEP = 2**32
"""Masking key of held-out texts: the same masks at every evaluation, and never those of a training step."""


MaskedBatches = tuple[list[PackedBatch], list[np.ndarray]]
"""Packed micro-batches with labels, and the row numbers in each."""


class MntpStage:
    """Loss: cross-entropy summed over masked tokens, divided by their number over all ranks."""

    def __init__(
        self,
        model: MntpModel,
        texts: PreparedTexts,
        held_out_texts: PreparedTexts | None,
        masking: Masking,
        *,
        seed: int,
        global_batch_size: int,
        max_tokens_per_micro_batch: int,
    ) -> None:
        self.model = model
        self.encoder = model.encoder
        self.texts = texts
        self.data_fingerprint = texts.fingerprint
        self.global_batch = EpochBatches(len(texts), global_batch_size, seed)
        self.held_out_texts = held_out_texts
        self.masking = masking
        self.seed = seed
        self.max_tokens = max_tokens_per_micro_batch

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
        n_masked_global = max(float(all_reduce_sum(torch.tensor(float(n_masked), device=device))), 1.0)
        n_passes = equal_count(groups, device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        bad_rows: list[int] = []
        for index in range(n_passes):
            own = index < len(packed)
            batch, group = (packed[index], groups[index]) if own else (packed[0], groups[0])
            torch.manual_seed(dropout_seed(self.seed, step, rank(), index))
            loss_M, hit_M, text_M = forward(batch.to(device))
            share = loss_M.sum() / n_masked_global
            backward(share if own else share * 0, rows=group.tolist(), last=index == n_passes - 1)
            if own:
                bad = text_M[~loss_M.detach().isfinite()].unique()
                bad_rows.extend(int(group[i]) for i in bad.tolist())
                sums += torch.stack([loss_M.detach().sum(), hit_M.sum()])
        loss, accuracy = (all_reduce_sum(sums) / n_masked_global).tolist()
        n_tokens = sum(batch.n_tokens for batch in packed)
        return StepResult(loss, n_tokens, {"accuracy": accuracy}, bad_rows)

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        if self.held_out_texts is None:
            return None
        rows = rank_slice(np.arange(len(self.held_out_texts)), rank(), world_size())
        batches, groups = self._masked_batches(self.held_out_texts, rows, HELD_OUT_STEP)
        device = self.encoder.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for index in range(equal_count(groups, device)):
            loss_M, hit_M, _ = forward(batches[min(index, len(batches) - 1)].to(device))
            if index < len(batches):
                sums += torch.stack([loss_M.sum(), hit_M.sum(), torch.tensor(len(loss_M), device=device)])
        loss, hits, count = all_reduce_sum(sums).tolist()
        return {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "n_masked": count}

    def _masked_batches(self, texts: PreparedTexts, rows: np.ndarray, step: int) -> MaskedBatches:
        batches, groups = [], []
        for group in plan_micro_batches(texts.lengths[rows], self.max_tokens):
            own_rows = rows[group]
            masked, labels = self._mask(texts[own_rows], own_rows, step)
            batches.append(pack(masked, labels))
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
    assert batch.labels is not None
    return int((batch.labels != NOT_PREDICTED).sum())
