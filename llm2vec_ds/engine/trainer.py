"""The one training loop. It owns schedule, checks and logging, and knows nothing of losses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.config import OptimizerConfig, Recipe
from llm2vec_ds.data.batches import rank_slice
from llm2vec_ds.distributed import TRAFFIC, all_reduce_sum, barrier, rank, world_size
from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.engine.monitor import FiniteCheck, MetricsLog, peak_mib
from llm2vec_ds.model.adapter_stack import adapter_state
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.stages.base import Stage


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then constant or linear decay towards zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    return config.lr * (max_steps - step) / max(max_steps - config.warmup_steps, 1)


class Trainer:
    """Trains a stage's model to `recipe.max_steps` and writes the encoder."""

    def __init__(self, recipe: Recipe, stage: Stage, engine: Engine, folder: Path) -> None:
        self.recipe = recipe
        self.stage = stage
        self.engine = engine
        self.folder = folder
        self.device = stage.encoder.device
        self.check = FiniteCheck(stage.model, self.device)

    def run(self) -> None:
        """The whole run.

        Raises:
            NonFiniteError: a loss or gradient was not finite; the weights have not moved.
        """
        log = MetricsLog(self.folder, self.recipe.max_steps, self.recipe.stage)
        try:
            self._measure(0, log)
            for step in range(self.recipe.max_steps):
                metrics = self._step(step)
                log.step(metrics)
                numbers = {k: v for k, v in metrics.items() if k != "step" and not isinstance(v, dict)}
                shown = {f"train/{k}": v for k, v in numbers.items()}
                self.engine.write_metrics(shown, step + 1)
                if self._held_out_is_due(step + 1):
                    self._measure(step + 1, log)
        finally:
            log.close()
        self._save()

    def _step(self, step: int) -> dict[str, Any]:
        recipe, started, sent_before = self.recipe, time.perf_counter(), TRAFFIC.sent_bytes.copy()
        rows = rank_slice(self.stage.global_batch(step), rank(), world_size())
        self.engine.train()
        result = self.stage.step(step, rows, self.engine.forward, self._backward)
        self.check.stop_if_not_finite(step + 1, result.bad_rows, self._describe)
        lr = learning_rate(step, recipe.max_steps, recipe.optimizer)
        grad_norm = self.engine.step(lr)
        n_tokens = int(all_reduce_sum(torch.tensor(result.n_tokens, device=self.device)))
        elapsed_s = time.perf_counter() - started
        sent = TRAFFIC.sent_bytes - sent_before
        return {
            "step": step + 1,
            "loss": result.loss,
            **result.metrics,
            "lr": lr,
            "grad_norm": grad_norm,
            "n_tokens": n_tokens,
            "tokens_per_s": n_tokens / elapsed_s,
            "step_ms": elapsed_s * 1e3,
            "peak_mib": peak_mib(self.device),
            "comm_bytes": sent.total(),
            "comm_bytes_by_kind": dict(sent),
        }

    def _backward(self, share: torch.Tensor, *, rows: Sequence[int], last: bool) -> None:
        # DeepSpeed averages gradients over ranks; shares of one loss have to be added.
        self.engine.backward(share * world_size(), last=last)
        self.check.end_of_backward(share, rows)

    def _held_out_is_due(self, step: int) -> bool:
        every = self.recipe.held_out_every_steps
        return step == self.recipe.max_steps or (every > 0 and step % every == 0)

    def _measure(self, step: int, log: MetricsLog) -> None:
        self.engine.train(False)
        metrics = self.stage.held_out(self.engine.forward)
        if metrics is not None:
            log.held_out({"step": step, **metrics})
            self.engine.write_metrics({f"held_out/{k}": v for k, v in metrics.items()}, step)

    def _describe(self, row: int) -> str:
        words = self.stage.encoder.tokenizer.decode(self.stage.text(row).input_ids, skip_special_tokens=True)
        return repr(words if len(words) <= 60 else words[:57] + "…")

    def _save(self) -> None:
        """Every rank helps to make partitioned weights whole; rank 0 writes `encoder/`."""
        encoder = self.stage.encoder
        state_dict = merged_state_dict(encoder.trunk, self.engine.gather())
        adapters = adapter_state(encoder.trunk, self.engine.gather()) if encoder.stack else None
        if rank() == 0:
            encoder.save(self.folder / "encoder", state_dict, adapters)
        barrier()
