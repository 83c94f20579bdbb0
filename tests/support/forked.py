"""Processes forked from a server that has the libraries loaded: they start in a second and not in ten."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.support.ports import free_port

HUNG = -999
Own = Callable[[], None]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables that say which rank a process is; a run within the tests' own process leaves them behind."""


def server() -> BaseContext:
    """What processes start from; Python has one server for all of a test process."""
    if torch.cuda.is_available():  # a forked process cannot use what its server has begun
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm2vec_ds.engine.run", "deepspeed", "peft"])
    return context


def own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """This process's environment, with what a launcher adds."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in own.items()}, "MASTER_ADDR": "127.0.0.1"}


def enter(environment: dict[str, str]) -> None:
    """First in a forked process, whose own environment is the server's, so that of an earlier test. Where
    tests run in the background, signals are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)


def write_to(log: str) -> None:
    """Both outputs of this process go to a file, also those of C++."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def exit_code_of(arguments: list[str]) -> int:
    """`llm2vec-ds ARGUMENTS` in this process."""
    from llm2vec_ds.__main__ import main

    sys.argv = ["llm2vec-ds", *arguments]
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _command(environment: dict[str, str], log: str, line: list[str], own: Own | None) -> None:
    write_to(log)
    enter(environment)
    if own is not None:
        own()
    os._exit(exit_code_of(line))  # without the server's own clean-up


def wait(processes: list[BaseProcess], timeout_s: float = 120) -> list[int]:
    """Exit codes (negative: a signal), `HUNG` for a rank that had to be killed because it did not end."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [HUNG if process.exitcode is None else process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def forked_command(arguments: list[str], ranks: int, log: Path) -> list[int]:
    """`llm2vec-ds ARGUMENTS` on each rank, with output to LOG.RANK; exit codes as of `wait`."""
    return wait(start_command(arguments, [f"{log}.{rank}" for rank in range(ranks)]), timeout_s=300)


def start_command(arguments: list[str], logs: list[str], own: Own | None = None) -> list[BaseProcess]:
    """`llm2vec-ds ARGUMENTS` on as many ranks as there are logs.

    Args:
        logs: the file that each rank writes to.
        own: called in each process before the command, at module level of a test file.
    """
    ranks, port = len(logs), free_port()
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        environment = rank_environment(rank, ranks, port) if ranks > 1 else own_environment()
        processes.append(server().Process(target=_command, args=(environment, log, arguments, own)))
        processes[-1].start()
    return processes
