"""The metrics of each step: the rows of metrics.jsonl and held_out.jsonl, and the progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from llm2vec_ds.distributed import rank
from llm2vec_ds.encoder.of_run import HELD_OUT, METRICS
from llm2vec_ds.errors import say, writing
from llm2vec_ds.objectives.base import StepResult
from llm2vec_ds.storage.durable import replace_file
from llm2vec_ds.storage.reading import parse_json, read_json_lines

log = logging.getLogger(__name__)

LINE_EVERY_S = 10


def step_metrics(
    step: int,
    result: StepResult,
    *,
    lr: float,
    grad_norm: float,
    n_tokens: int,
    elapsed_s: float,
    data_s: float,
    sent_bytes: Counter[str],
    device: torch.device,
) -> dict[str, Any]:
    """Returns a row of metrics.jsonl.

    Args:
        step: counts from 1.
        n_tokens: tokens of all ranks in this step.
        elapsed_s: time of the whole step.
        data_s: the part of `elapsed_s` that this rank waited for micro-batches.
        sent_bytes: bytes that this rank sent, by kind of collective.
    """
    return {
        "step": step,
        "loss": result.loss,
        **result.metrics,
        "lr": lr,
        "grad_norm": grad_norm,
        "n_tokens": n_tokens,
        "tokens_per_s": n_tokens / elapsed_s,
        "step_ms": elapsed_s * 1e3,
        "data_ms": data_s * 1e3,
        "peak_mib": peak_mib(device),
        "comm_bytes": sent_bytes.total(),
        "comm_bytes_by_kind": dict(sent_bytes),
    }


class TrainingTotals(NamedTuple):
    """What a run's training took. `training_s` is the time of its steps, without measurements."""

    steps: int
    trained_tokens: int
    training_s: float


@dataclass(frozen=True)
class _Step:
    """The part of a row of metrics.jsonl that the totals need."""

    n_tokens: int
    step_ms: float


def training_totals(folder: Path) -> TrainingTotals:
    """Sums the metrics.jsonl of a run's folder.

    Raises:
        UserError: the file is damaged.
    """
    steps = list(read_json_lines(folder / METRICS, _Step, "train again, or restore the file"))
    ms = sum(step.step_ms for step in steps)
    return TrainingTotals(len(steps), sum(step.n_tokens for step in steps), ms / 1e3)


class MetricsLog:
    """Writes metrics.jsonl (one object a step), held_out.jsonl and progress on stderr. Only rank 0 writes."""

    def __init__(self, folder: Path, max_steps: int, stage: str, first_step: int = 0) -> None:
        """
        Args:
            first_step: steps already taken. Rows of later steps are deleted: a run that was cut off may have
                written them after its last checkpoint.
        """
        self._writes = rank() == 0
        self._metrics, self._held_out = folder / METRICS, folder / HELD_OUT
        self._files = (self._metrics, self._held_out)
        self._stage = stage
        self._max_steps = max_steps
        # A terminal shows a bar. A file (the log of a batch job) gets a line now and then.
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            desc=stage,
            unit="step",
            disable=None if self._writes else True,
            dynamic_ncols=True,
        )
        self._said_at = -math.inf
        if self._writes:
            with writing(self._metrics):
                self._metrics.touch()
            for path in filter(Path.exists, self._files):
                with writing(path):
                    _cut_after(path, first_step)

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Flushes all rows to the disk. A checkpoint is saved after this, so its rows are never lost."""
        for path in filter(Path.exists, self._files if self._writes else ()):
            with writing(path), path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def step(self, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._append(self._metrics, values)
        shown = "loss {loss:.4f}, {tokens_per_s:.0f} tokens/s, peak {peak_mib:.0f} MiB".format(**values)
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if not self._bar.disable:
            return
        now = time.monotonic()
        if now - self._said_at >= LINE_EVERY_S or values["step"] == self._max_steps:
            self._said_at = now
            log.info("%s, step %s of %s: %s", self._stage, values["step"], self._max_steps, shown)

    def measuring(self, step: int) -> None:
        """Says that held-out texts are measured, which can take minutes."""
        if not self._bar.disable:
            self._bar.set_postfix_str("measuring held-out texts")
        elif self._writes:
            log.info("%s, step %s: measuring held-out texts", self._stage, step)

    def held_out(self, values: dict[str, Any]) -> None:
        self._bar.unpause()  # the time of a step is without that of measurements
        if not self._writes:
            return
        self._append(self._held_out, values)
        measured = {k: v for k, v in values.items() if isinstance(v, float) and not k.startswith("n_")}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        with tqdm.external_write_mode(file=sys.stderr):
            say(f"held out, step {values['step']}: {shown}")

    def close(self) -> None:
        self._bar.close()


def _cut_after(path: Path, step: int) -> None:
    """Keeps the rows up to `step`. Drops everything from the first unreadable row on, which a kill left."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            break
    replace_file(path, "".join(kept).encode())


def peak_mib(device: torch.device) -> float:
    """Returns the peak of memory so far: allocated on the GPU, or resident on the host for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
