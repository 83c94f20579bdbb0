"""The training loop. It owns schedule, checks, checkpoints and logging, and knows nothing about losses."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2vec_ds.data.batches import rank_slice
from llm2vec_ds.data.prefetch import Prefetch
from llm2vec_ds.distributed import (
    TRAFFIC,
    all_reduce_sum,
    barrier,
    explain_lost_rank,
    on_first_rank,
    rank,
    world_size,
)
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import ENCODER
from llm2vec_ds.engine.checkpoint import Checkpoint, CheckpointStore, Hashes, Manifest
from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.engine.finite_check import FiniteCheck
from llm2vec_ds.engine.graphs import use_graphs
from llm2vec_ds.engine.identity import made_by
from llm2vec_ds.engine.metrics import MetricsLog, step_metrics
from llm2vec_ds.engine.moving_average import MovingAverage
from llm2vec_ds.engine.progress_check import ProgressCheck
from llm2vec_ds.engine.run_folder import mark_finished
from llm2vec_ds.engine.watchdog import Watchdog
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapter_stack import adapter_state
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.objectives.base import Stage
from llm2vec_ds.process.preemption import StopRequest
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import OptimizerConfig

log = logging.getLogger(__name__)

Evaluation = Callable[[Encoder], dict[str, float]]
"""Measures the encoder in its current state. Every rank gets the same numbers."""


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Returns the learning rate of step `step`, counted from 0.

    The rate rises linearly during warm-up. Then it follows `schedule`. Falling schedules reach zero at
    `max_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    n_falling = max(max_steps - config.warmup_steps, 1)
    if config.schedule == "wsd":
        n_falling = max(round(config.decay_share * max_steps), 1)
    left = min((max_steps - step) / n_falling, 1.0)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return config.lr * (1 - math.cos(math.pi * left)) / 2
    return config.lr * left


class Trainer:
    """Trains a stage's model to `recipe.max_steps` and writes the encoder.

    Args:
        store: keeps the checkpoints.
        identity: what the run is made of. Each checkpoint holds it.
        stop: says at the end of each step whether the run is to stop.
        evaluation: measures the encoder, in addition to the stage's own held-out texts.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        engine: Engine,
        folder: Path,
        *,
        store: CheckpointStore,
        identity: dict[str, Any],
        stop: StopRequest,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.recipe = recipe
        self.stage = stage
        self.engine = engine
        self.folder = folder
        self.store = store
        self.identity = identity
        self.made_by = made_by(recipe)
        self.stop = stop
        self.evaluation = evaluation
        self.device = stage.encoder.device
        decay = recipe.optimizer.ema
        self.average = None if decay is None else MovingAverage(engine.state, decay)
        self.check = FiniteCheck(engine.trainable)
        self.watchdog = Watchdog(recipe.step_timeout_s, folder)
        self.prefetch = Prefetch(self._rows_and_batches, recipe.max_steps)
        self.graphed = use_graphs(recipe, stage, engine)
        if self.graphed is not None:
            self.graphed.while_recording = self.prefetch.paused
        self._best_score: float | None = on_first_rank(store.best_score)

    def run(self, checkpoint: Checkpoint | None = None) -> bool:
        """Runs all steps, or those that are left after `checkpoint`.

        Returns:
            Whether the run was asked to stop during its last step. All ranks return the same.

        Raises:
            NonFiniteError: a loss or gradient was not finite. The weights have not moved.
            Stopped: the run was asked to stop, and everything is saved.
            UserError: a checkpoint could not be written, another rank is gone, or nothing is learned.
        """
        asked = False
        first_step = checkpoint.step if checkpoint else 0
        self.progress = ProgressCheck(self.recipe.max_steps - first_step, from_start=checkpoint is None)
        log_rows = MetricsLog(self.folder, self.recipe.max_steps, self.recipe.stage, first_step)
        try:
            with self.watchdog.watching():
                if checkpoint is None:
                    self._measure(0, log_rows)
                else:
                    self._load(checkpoint)
                for step in range(first_step, self.recipe.max_steps):
                    asked = self._step_and_save(step, log_rows)
                self.progress.last_word()
                self._finish()
        finally:
            self.prefetch.close()
            log_rows.close()
        return asked

    def _rows_and_batches(self, step: int) -> tuple[np.ndarray, Any]:
        """Returns this rank's rows of the step and their micro-batches."""
        rows = rank_slice(self.stage.global_batch(step), rank(), world_size())
        return rows, self.stage.batches(step, rows)

    def _step_and_save(self, step: int, log_rows: MetricsLog) -> bool:
        """Takes a step, measures and saves what is due. Stops here if any rank was asked to stop.

        In the last step it does not stop, but returns whether any rank was asked to.
        """
        self.watchdog.begin(f"step {step + 1}")
        with explain_lost_rank(f"step {step + 1}"):
            metrics, asked = self._step(step)
        log_rows.step(metrics)
        numbers = {k: v for k, v in metrics.items() if k != "step" and not isinstance(v, dict)}
        self.engine.write_metrics({f"train/{k}": v for k, v in numbers.items()}, step + 1)
        score = self._measure(step + 1, log_rows)
        ends = step + 1 == self.recipe.max_steps
        if self._is_best(score) or (asked and not ends) or self._save_is_due(step + 1):
            log_rows.sync()
            self._save_checkpoint(step + 1, score)
        if asked and not ends:
            raise self.stop.stopped(f"after step {step + 1} of {self.recipe.max_steps}, everything saved")
        return asked

    def _step(self, step: int) -> tuple[dict[str, Any], bool]:
        """Takes one optimizer step. Returns its metrics, and whether any rank was asked to stop."""
        recipe, started, sent_before = self.recipe, time.perf_counter(), TRAFFIC.sent_bytes.copy()
        rows, batches = self.prefetch(step)
        data_s = time.perf_counter() - started
        self.engine.train()
        if self.graphed is not None:
            self.graphed.fill_share()  # resets the count: a measurement before this step is not part of it
        result = self.stage.step(step, rows, batches, self.engine.forward, self._backward)
        self.check.stop_if_not_finite(step + 1, result.bad_rows, self._describe)
        lr = learning_rate(step, recipe.max_steps, recipe.optimizer)
        grad_norm = self.engine.step(lr)
        if self.average is not None:
            self.average.update(step)
        still = grad_norm == 0.0 and self.engine.measures_gradients
        self.progress.look(step + 1, loss=result.loss, still=still, vectors_alike=result.vectors_alike)
        asked = self.stop.seen(look_for_file=rank() == 0)
        n_tokens, n_asked = all_reduce_sum(
            torch.tensor([result.n_tokens, int(asked)], device=self.device)
        ).tolist()
        elapsed_s = time.perf_counter() - started
        sent = TRAFFIC.sent_bytes - sent_before
        metrics = step_metrics(
            step + 1,
            result,
            lr=lr,
            grad_norm=grad_norm,
            n_tokens=n_tokens,
            elapsed_s=elapsed_s,
            data_s=data_s,
            sent_bytes=sent,
            device=self.device,
        )
        if self.graphed is not None:
            metrics["fill_share"] = self.graphed.fill_share()
        return metrics, n_asked > 0

    def _backward(self, share: torch.Tensor, *, rows: Sequence[int], last: bool) -> None:
        # Each rank's loss is a share of the global loss, so gradients have to be summed over ranks. DeepSpeed
        # averages them. The factor undoes that.
        self.engine.backward(share * world_size(), last=last)
        self.check.end_of_backward(share, rows)

    def _is_due(self, step: int, every: int) -> bool:
        return step in (0, self.recipe.max_steps) or (every > 0 and step % every == 0)

    def _save_is_due(self, step: int) -> bool:
        every = self.recipe.checkpoint.every_steps
        return every > 0 and step % every == 0

    def _is_best(self, score: float | None) -> bool:
        order, best = self.store.order, self._best_score
        return score is not None and (best is None or order(score) < order(best))

    def _measure(self, step: int, log_rows: MetricsLog) -> float | None:
        """Takes the measurements that are due after `step`.

        Returns:
            The metric that decides which checkpoint is best, if it was measured.
        """
        self.watchdog.begin(f"the measurement after step {step}")
        held_out_due = self._is_due(step, self.recipe.held_out_every_steps)
        evaluation = self.recipe.evaluation
        evaluation_due = evaluation is not None and self._is_due(step, evaluation.every_steps)
        metrics: dict[str, float] = {}
        # The mode changes only if something is measured: a change walks over all modules.
        if held_out_due or evaluation_due:
            averaged = self.average.in_place() if self.average is not None else nullcontext()
            with explain_lost_rank("the measurement"), averaged:
                self.engine.train(False)
                if self.evaluation is not None or self.recipe.data.held_out_path is not None:
                    log_rows.measuring(step)
                if held_out_due:
                    metrics |= self.stage.held_out(self.engine.forward) or {}
                if evaluation_due and self.evaluation is not None:
                    metrics |= self.evaluation(self.stage.encoder)
        if metrics:
            log_rows.held_out({"step": step, **metrics})
            self.engine.write_metrics({f"held_out/{k}": v for k, v in metrics.items()}, step)
        name = self.recipe.checkpoint.best_by
        everything_due = held_out_due and (evaluation is None or evaluation_due)
        if name is not None and name not in metrics and everything_due:
            known = f"one of {', '.join(metrics)}" if metrics else "nothing without data.held_out_path"
            raise UserError(f"checkpoint.best_by={name} is no held-out metric of this run: choose {known}")
        score = metrics.get(name) if name else None
        if score is not None and not math.isfinite(score):
            log.warning("step %s: %s is %s, so this step cannot be the best", step, name, score)
            return None
        return score

    def _describe(self, row: int) -> str:
        words = self.stage.encoder.tokenizer.decode(self.stage.text(row).input_ids, skip_special_tokens=True)
        return repr(words if len(words) <= 60 else words[:57] + "…")

    def _save_checkpoint(self, step: int, score: float | None) -> None:
        self.watchdog.begin(f"the checkpoint of step {step}")
        score_of = None if score is None else self.recipe.checkpoint.best_by
        manifest = Manifest(step, self.identity, self.made_by, score, score_of)
        started = time.perf_counter()
        with explain_lost_rank(f"the checkpoint of step {step}"):
            folder = self.store.save(manifest, self._write_state)
        if self._is_best(score):
            self._best_score = score
        log.info("%s saved in %.1f s", folder, time.perf_counter() - started)

    def _write_state(self, folder: Path) -> Hashes:
        average = self.average.write(folder) if self.average is not None else {}
        return self.engine.state.write(folder) | average

    def _load(self, checkpoint: Checkpoint) -> None:
        self.watchdog.begin("loading the checkpoint")
        with explain_lost_rank("loading the checkpoint"):
            self._make_moments()
            try:
                if self.average is not None:
                    self.average.load(checkpoint.folder, checkpoint.manifest.files)
                self.engine.state.load(checkpoint.folder, checkpoint.manifest.files)
            except ValueError as error:
                raise UserError(f"{error}: use the recipe and model of the checkpoint") from None
            barrier()

    def _make_moments(self) -> None:
        """Takes a step of one text a rank, at a learning rate of zero.

        DeepSpeed makes and links Adam's moments in its first step only. The checkpoint is loaded afterwards
        and overwrites what the step changed.
        """
        rows = rank_slice(self.stage.global_batch(0)[: world_size()], rank(), world_size())
        self.engine.train()
        self.stage.step(0, rows, self.stage.batches(0, rows), self.engine.forward, self._backward)
        self.check.forget()
        self.engine.step(0.0)

    def _finish(self) -> None:
        """Writes `encoder/` and marks the run as finished.

        Under ZeRO-3 each rank holds a part of the weights, so every rank takes part in gathering them. Rank 0
        writes.
        """
        best = on_first_rank(self.store.best)
        if self.recipe.checkpoint.best_by and best is not None:
            log.info("the encoder is that of step %s, %s", best.step, self.recipe.checkpoint.best_by)
            self._load(best)  # loads the average of that step too
        self.watchdog.begin("writing the encoder")
        if self.average is not None:
            self.average.swap()  # not undone: nothing needs the raw weights after this
        encoder = self.stage.encoder
        # In place, no second copy of the model is made. Partitioned and 4-bit weights cannot take the update.
        in_place = self.engine.zero_stage < 3 and self.recipe.model.quantization is None
        state_dict = merged_state_dict(encoder.trunk, self.engine.gather(), in_place=in_place)
        adapters = adapter_state(encoder.trunk, self.engine.gather()) if encoder.stack else None
        if rank() == 0:
            # `finished` comes last: after a kill between the two lines the run counts as unfinished.
            encoder.save(self.folder / ENCODER, state_dict, adapters)
            mark_finished(self.folder, self.recipe.max_steps, self.identity)
        barrier()
