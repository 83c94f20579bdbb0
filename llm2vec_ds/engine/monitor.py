"""What a run says about itself: finite or not, metrics.jsonl, the progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llm2vec_ds.distributed import all_gather_object, rank
from llm2vec_ds.errors import UserError, say, writing
from llm2vec_ds.storage.durable import replace_file
from llm2vec_ds.storage.reading import parse_json

log = logging.getLogger(__name__)

LINE_EVERY_S = 10
TEXTS_NAMED = 3


class NonFiniteError(UserError):
    """A loss, vector or gradient was NaN or infinite; the weights have not moved."""


class FiniteCheck:
    """Stops all ranks before the step that would spread a NaN or an infinity.

    DeepSpeed alone does not: under ZeRO-0 in fp32 a NaN is stepped into the weights, under ZeRO-1 to 3 the
    step is skipped while the step counter moves on. Hooks look at each local gradient before ranks
    exchange it, so that the texts behind it can be named.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._seen: list[tuple[torch.Tensor, list[int]]] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        self._bad = self._bad | ~gradient.detach().isfinite().all()

    def forget(self) -> None:
        """Drops what was noted since the last check."""
        self._bad = torch.zeros_like(self._bad)
        self._seen.clear()

    def end_of_backward(self, loss: torch.Tensor, rows: Sequence[int]) -> None:
        """Notes whether the micro-batch of `rows` had a bad loss or gradient; no wait for the device."""
        self._seen.append((self._bad | ~loss.detach().isfinite(), list(rows)))
        self._bad = torch.zeros_like(self._bad)

    def stop_if_not_finite(self, step: int, bad_rows: list[int], describe: Callable[[int], str]) -> None:
        """Agrees with all ranks; every rank raises the same error.

        Args:
            bad_rows: rows whose own loss or vector is known to be bad; they are named rather than all
                the rows of their micro-batch, or of ranks that only received the bad value.
            describe: row number → a few words of the text.

        Raises:
            NonFiniteError: on any rank something was not finite.
        """
        flags = [bool(flag) for flag, _ in self._seen]
        suspects = [row for flag, (_, rows) in zip(flags, self._seen, strict=True) if flag for row in rows]
        self._seen.clear()
        named = bad_rows or suspects
        words = [f"{row} ({describe(row)})" for row in named[:TEXTS_NAMED]]
        more = f" and {len(named) - TEXTS_NAMED} more" if len(named) > TEXTS_NAMED else ""
        mine = (bool(bad_rows), bool(named), f"rank {rank()}, text {', '.join(words)}{more}")
        everyone = all_gather_object(mine)
        if not any(found for _, found, _ in everyone):
            return
        sure = any(certain for certain, _, _ in everyone)
        places = [place for certain, found, place in everyone if (certain if sure else found)]
        raise NonFiniteError(
            f"step {step}: loss or gradient is not finite ({'; '.join(places)}). The weights have not "
            "moved in this step: lower optimizer.lr, or look at these texts"
        )


class MetricsLog:
    """metrics.jsonl (one object a step) and progress on stderr; rank 0 writes, the others keep still."""

    def __init__(self, folder: Path, max_steps: int, stage: str, first_step: int = 0) -> None:
        """Args: first_step: steps already taken; rows of later ones, of a run that was cut off, go."""
        self._writes = rank() == 0
        self._files = (folder / "metrics.jsonl", folder / "held_out.jsonl")
        self._stage = stage
        self._max_steps = max_steps
        # In a terminal a bar; in a file (a batch job's log) a line now and then.
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
            with writing(self._files[0]):
                self._files[0].touch()
            for path in filter(Path.exists, self._files):
                with writing(path):
                    _cut_after(path, first_step)

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Rows written so far are on the disk when this returns: a checkpoint comes after its rows."""
        for path in filter(Path.exists, self._files if self._writes else ()):
            with writing(path), path.open("a") as file:
                os.fsync(file.fileno())

    def step(self, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._append(self._files[0], values)
        shown = "loss {loss:.4f}, {tokens_per_s:.0f} tokens/s, peak {peak_mib:.0f} MiB".format(**values)
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if not self._bar.disable:
            return
        now = time.monotonic()
        if now - self._said_at >= LINE_EVERY_S or values["step"] == self._max_steps:
            self._said_at = now
            log.info("%s, step %s of %s: %s", self._stage, values["step"], self._max_steps, shown)

    def held_out(self, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._append(self._files[1], values)
        shown = ", ".join(
            f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float) and k != "n_masked"
        )
        with tqdm.external_write_mode(file=sys.stderr):
            say(f"held out, step {values['step']}: {shown}")

    def close(self) -> None:
        self._bar.close()


def _cut_after(path: Path, step: int) -> None:
    """Keeps the rows of the first `step` steps; what a kill left unreadable is none."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            break
    replace_file(path, "".join(kept).encode())


def peak_mib(device: torch.device) -> float:
    """Highest memory so far: allocated on the GPU, or resident on the host for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
