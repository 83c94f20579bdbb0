"""One attempt at a run on several gloo ranks, each a process of its own in which a fault can be planted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support.forked import enter, exit_code_of, rank_environment, server, wait, write_to
from tests.support.ports import free_port

MARKS = ("met", "training")
DURABLE_OPERATIONS = ("write", "fsync", "rename")


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank.

    Attributes:
        rank: where.
        kind: `kill` (SIGKILL) or `full` (no space left) at a file operation, `hang`, `nan`, `memory` in a
            step, `signal` (USR1 to itself) in a step, `absent` (SIGKILL) once the ranks have met.
        at: number of the file operation, or of the step, counted from 0.
        half: a write is cut in the middle instead of before its first byte.
    """

    rank: int
    kind: str
    at: int = 0
    half: bool = False


def start(recipe: Path, world: int, log: Path, fault: Fault | None = None) -> list[BaseProcess]:
    """Starts `llm2vec-ds train RECIPE resume=true` on `world` ranks.

    Output goes to LOG.RANK; a rank that has met the others makes LOG.RANK.met, one that is set up and begins
    to train LOG.RANK.training.
    """
    port = free_port()
    for rank in range(world):
        for mark in MARKS:
            Path(f"{log}.{rank}.{mark}").unlink(missing_ok=True)
    processes: list[BaseProcess] = []
    for rank in range(world):
        own = fault if fault is not None and fault.rank == rank else None
        arguments = (rank, world, rank_environment(rank, world, port), str(recipe), f"{log}.{rank}", own)
        process = server().Process(target=_rank, args=arguments)
        process.start()
        processes.append(process)
    return processes


def attempt(recipe: Path, world: int, log: Path, fault: Fault | None = None) -> list[int]:
    """`start` and `wait`."""
    return wait(start(recipe, world, log, fault))


def _rank(
    rank: int,
    world: int,
    environment: dict[str, str],
    recipe: str,
    log: str,
    fault: Fault | None,
) -> None:
    write_to(log)
    enter(environment)
    from llm2vec_ds.engine import trainable_state

    trainable_state.PART_BYTES = 2**15  # several parts, so that each rank writes
    operations = _count_operations(fault)
    if fault is not None:
        _plant(fault, [Path(log).with_suffix(f".{peer}.met") for peer in range(world)])
    _mark(log)
    try:
        code = exit_code_of(["train", recipe, "resume=true"])
    finally:
        Path(f"{log}.operations").write_text(f"{operations()}\n")
    os._exit(code)  # without the server's own clean-up


def _count_operations(fault: Fault | None) -> Callable[[], str]:
    """Puts the fault before the chosen write, fsync or rename.

    Returns what was seen so far, in order: `KIND:SAVES`, the saves begun until then.
    """
    from llm2vec_ds.engine.checkpoint import CheckpointStore

    seen: list[str] = []
    saves = 0
    whole_save = CheckpointStore.save

    def save(*arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        return whole_save(*arguments)

    CheckpointStore.save = save  # type: ignore[method-assign]

    def wrapped(kind: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if not _is_own(sys._getframe(1)):
                return operation(*arguments, **keywords)
            number = len(seen)
            seen.append(f"{kind}:{saves}")
            if fault is not None and fault.kind in ("kill", "full") and fault.at == number:
                if fault.half and kind == "write":
                    descriptor, content = arguments
                    operation(descriptor, content[: len(content) // 2])
                if fault.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, os.strerror(28))
            return operation(*arguments, **keywords)

        return run

    for kind in DURABLE_OPERATIONS:
        setattr(os, kind, wrapped(kind, getattr(os, kind)))
    return lambda: " ".join(seen)


def _mark(log: str) -> None:
    from llm2vec_ds.engine import run
    from llm2vec_ds.engine.trainer import Trainer

    def marked(mark: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marking(*arguments: Any) -> Any:
            Path(f"{log}.{mark}").touch()
            return function(*arguments)

        return marking

    run.build_stage = marked("met", run.build_stage)
    Trainer.run = marked("training", Trainer.run)  # type: ignore[method-assign]


def _is_own(frame: FrameType | None) -> bool:
    """Whether the toolkit itself called, perhaps through a library function."""
    for _ in range(3):
        if frame is None or frame.f_globals["__name__"].startswith("llm2vec_ds."):
            return frame is not None
        frame = frame.f_back
    return False


def _plant(fault: Fault, have_met: list[Path]) -> None:
    import torch

    from llm2vec_ds.engine import run
    from llm2vec_ds.stages.contrastive import ContrastiveStage

    if fault.kind == "absent":

        def dies(*_: Any) -> Any:
            while not all(mark.exists() for mark in have_met):  # a peer may be meeting still
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        run.build_stage = dies
    whole_step = ContrastiveStage.step

    def step(self: Any, number: int, rows: Any, batches: Any, forward: Any, backward: Any) -> Any:
        if number == fault.at:
            if fault.kind == "hang":
                time.sleep(3600)
            if fault.kind == "memory":
                raise torch.OutOfMemoryError
            if fault.kind == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)  # a second one must not break the save
        result = whole_step(self, number, rows, batches, forward, backward)
        if number == fault.at and fault.kind == "nan":
            result.bad_rows.append(int(rows[0]))
        return result

    ContrastiveStage.step = step  # type: ignore[method-assign]
