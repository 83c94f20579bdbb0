"""One attempt at a run on several gloo ranks, each a process of its own in which a fault can be planted."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults.operations import Fault, Operations
from tests.support.forked import enter, exit_code_of, rank_environment, server, wait, write_to
from tests.support.ports import free_port

MARKS = ("met", "training")


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
    operations = Operations(fault)
    _note_phases(operations)
    if fault is not None:
        _plant(fault, [Path(log).with_suffix(f".{peer}.met") for peer in range(world)])
    _mark(log)
    try:
        code = exit_code_of(["train", recipe, "resume=true"])
    finally:
        Path(f"{log}.operations").write_text(f"{' '.join(operations.seen)}\n")
    os._exit(code)  # without the server's own clean-up


def _note_phases(operations: Operations) -> None:
    """`start` until the first save, then the number of saves begun, and `encoder` from its writing on."""
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.engine.checkpoint import CheckpointStore

    saves = 0
    whole_save, whole_encoder = CheckpointStore.save, Encoder.save

    def save(*arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        operations.phase = str(saves)
        return whole_save(*arguments)

    def save_encoder(*arguments: Any) -> Any:
        operations.phase = "encoder"
        return whole_encoder(*arguments)

    CheckpointStore.save = save  # type: ignore[method-assign]
    Encoder.save = save_encoder  # type: ignore[method-assign]


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


def _plant(fault: Fault, have_met: list[Path]) -> None:
    import torch

    from llm2vec_ds.engine import run
    from llm2vec_ds.objectives.contrastive.objective import ContrastiveStage

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
            if fault.kind == "nan":
                whole = backward
                backward = lambda share, **options: whole(share * float("nan"), **options)  # noqa: E731
        result = whole_step(self, number, rows, batches, forward, backward)
        if number == fault.at and fault.kind == "nan":
            result = dataclasses.replace(result, bad_rows=lambda: [int(rows[0])])
        return result

    ContrastiveStage.step = step  # type: ignore[method-assign]
