"""Ctrl-C, SIGTERM and a closed terminal, sent to real processes: what they print, keep and return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.engine.checkpoint import CheckpointStore
from llm2vec_ds.errors import Stopped
from llm2vec_ds.process.child_command import run_command
from llm2vec_ds.process.interrupts import HANDED_ON_S, Interrupted, interruptible
from tests.support.forked import own_environment, start_command, wait
from tests.support.runs import recipe, write_recipe

STOPPING = "llm2vec-ds: stopping after this step; press Ctrl-C again to end at once without saving"
MANY_STEPS = 100_000


def until(happened: Callable[[], Any], within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Run:
    """A run without end of its own."""

    def __init__(self, folder: Path, model: Path, texts: Path) -> None:
        self.folder = folder / "run"
        self.values = recipe("simcse", model, texts, self.folder, max_steps=MANY_STEPS)
        self.values["checkpoint"] = {"every_steps": 0}
        self.logs = [folder / "log.0"]

    def start(self, own: Callable[[], None] | None = None) -> list[BaseProcess]:
        path = write_recipe(self.values, self.folder.with_suffix(".yaml"))
        return start_command(["train", str(path)], list(map(str, self.logs)), own)

    def n_steps(self) -> int:
        file = self.folder / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def lines(self, rank: int = 0) -> list[str]:
        said = self.logs[rank].read_text()
        assert "Traceback" not in said, said
        return [line for line in said.splitlines() if line.startswith("llm2vec-ds: ")]

    def has_saved(self, cause: str) -> str:
        """The line that says so; every step is in the checkpoint."""
        found = CheckpointStore(self.folder / "checkpoints", keep_last=1).newest_valid()
        assert found is not None
        assert found.step == self.n_steps()
        return (
            f"llm2vec-ds: stopped by {cause} after step {found.step} of {MANY_STEPS}, everything saved: run "
            "the same command with resume=true to go on"
        )


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> Run:
    return Run(tmp_path, tiny_model_dir, texts_file)


def send(number: int, processes: list[BaseProcess]) -> None:
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_training_saves(name: str, run: Run) -> None:
    processes = run.start()
    until(lambda: run.n_steps() >= 2)
    send(signal.Signals[name], processes)
    assert wait(processes) == [Stopped.EXIT_CODE]
    assert run.lines() == [STOPPING, run.has_saved(name)]


def test_ranks_agree_and_one_speaks(run: Run, tmp_path: Path) -> None:
    run.logs.append(tmp_path / "log.1")
    processes = run.start()
    until(lambda: run.n_steps() >= 2)
    send(signal.SIGINT, processes)
    assert wait(processes) == [Stopped.EXIT_CODE] * 2
    assert run.lines() == [STOPPING, run.has_saved("SIGINT")]
    assert run.lines(1) == []


class Clock:
    """Time as the test sets it, for a process that notes each look at it."""

    def __init__(self, folder: Path) -> None:
        self._now, self._looks = folder / "now", folder / "looks"
        self.set(0.0)

    def set(self, seconds: float) -> None:
        self._now.write_text(str(seconds))

    def monotonic(self) -> float:
        with self._looks.open("a") as looks:
            looks.write("x")
        return float(self._now.read_text())

    def n_looks(self) -> int:
        return len(self._looks.read_text()) if self._looks.exists() else 0


def _third_step_without_end(clock: Clock) -> None:
    from llm2vec_ds.objectives.contrastive.objective import ContrastiveStage
    from llm2vec_ds.process import preemption

    preemption.time = clock
    whole = ContrastiveStage.step

    def step(self: Any, number: int, *arguments: Any) -> Any:
        if number == 2:
            time.sleep(3600)
        return whole(self, number, *arguments)

    ContrastiveStage.step = step  # type: ignore[method-assign]


def test_a_second_ctrl_c_ends_at_once_unless_a_launcher_hands_on_the_first(run: Run, tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    processes = run.start(partial(_third_step_without_end, clock))
    until(lambda: run.n_steps() == 2)
    send(signal.SIGINT, processes)
    until(run.lines)
    clock.set(HANDED_ON_S)
    send(signal.SIGTERM, processes)
    send(signal.SIGINT, processes)
    until(lambda: clock.n_looks() == 2)
    clock.set(HANDED_ON_S + 0.1)
    send(signal.SIGINT, processes)
    assert wait(processes) == [130]
    assert clock.n_looks() == 3  # so the second has not ended it
    assert run.lines() == [
        STOPPING,
        "llm2vec-ds: ended at once, the last checkpoint is kept: run the same command with resume=true",
    ]


def _as_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_closed_terminal_changes_nothing(run: Run) -> None:
    processes = run.start(_as_nohup)
    until(lambda: run.n_steps() >= 2)
    send(signal.SIGHUP, processes)
    then = run.n_steps()
    until(lambda: run.n_steps() >= then + 3)
    send(signal.SIGINT, processes)
    assert wait(processes) == [Stopped.EXIT_CODE]
    assert run.lines() == [STOPPING, run.has_saved("SIGINT")]


def test_a_terminal_that_is_really_closed(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path, run: Run
) -> None:
    """Its bar and lines can no longer be written."""
    run.values = recipe("mntp", tiny_model_dir, texts_file, run.folder, max_steps=MANY_STEPS)
    run.values |= {"held_out_every_steps": 1, "checkpoint": {"every_steps": 0}}
    run.values["data"]["held_out_path"] = str(texts_file)
    path = write_recipe(run.values, tmp_path / "r.yaml")
    master, slave = os.openpty()
    in_terminal = ["sh", "-c", 'exec <>"$0" >&0 2>&0; exec "$@"', os.ttyname(slave)]
    process = subprocess.Popen(
        [*in_terminal, sys.executable, "-m", "llm2vec_ds", "train", str(path)],
        env=own_environment(),
        start_new_session=True,
    )
    try:
        until(lambda: run.n_steps() >= 2)
        os.close(slave)
        os.close(master)
        assert process.wait(60) == Stopped.EXIT_CODE
    finally:
        process.kill()
    run.has_saved("SIGHUP")


def _loads_without_end() -> None:
    from llm2vec_ds.engine import run

    def loads(*_: Any) -> Any:
        Path(os.environ["LLM2VEC_DS_CACHE"]).mkdir(exist_ok=True)
        time.sleep(3600)

    run.build_stage = loads


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_before_the_first_step(name: str, code: int, run: Run) -> None:
    processes = run.start(_loads_without_end)
    until(Path(os.environ["LLM2VEC_DS_CACHE"]).exists)
    send(signal.Signals[name], processes)
    assert wait(processes) == [code]
    assert run.lines() == [
        f"llm2vec-ds: stopped by {name}: checkpoints and prepared texts are kept; run the same command with "
        "resume=true to go on"
    ]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_encoding_keeps_finished_blocks(
    name: str, code: int, tmp_path: Path, tiny_model_dir: Path, texts_file: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(texts_file.read_text() * 10_000)
    arguments = ["encode", "--model", str(tiny_model_dir), "--input", str(texts)]
    log = tmp_path / "log"
    processes = start_command([*arguments, "--output", str(tmp_path / "v.npy")], [str(log)])
    until((tmp_path / ".v.npy.encoding" / "progress.json").exists)
    send(signal.Signals[name], processes)
    assert wait(processes) == [code]
    assert log.read_text().splitlines()[-1] == (
        f"llm2vec-ds: stopped by {name}: finished blocks of 4,096 texts are kept; "
        "run the same command to go on"
    )
    assert "Traceback" not in log.read_text()
    assert (tmp_path / ".v.npy.encoding" / "progress.json").exists()
    assert not (tmp_path / "v.npy").exists()


def test_a_stopped_export_leaves_nothing_behind(tmp_path: Path, tiny_model_dir: Path) -> None:
    log = tmp_path / "log"
    processes = start_command(["export", str(tiny_model_dir), "--output", str(tmp_path / "out")], [str(log)])
    until(lambda: list(tmp_path.glob(".out.*/config.json")))
    send(signal.SIGTERM, processes)
    assert wait(processes) == [143]
    assert log.read_text().splitlines()[-1] == (
        "llm2vec-ds: stopped by SIGTERM: nothing is left behind; run the same command again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_command_within_a_command_is_told_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.write_text(
        f"#!/bin/sh\ntrap 'sleep 0.3; touch {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/started\n"
        "while :; do sleep 0.05; done\n"
    )
    inner.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(inner))

    def stop() -> None:
        until((tmp_path / "started").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with interruptible(), pytest.raises(Interrupted):
        run_command("train", "r.yaml")
    stopper.join()
    assert (tmp_path / "saved").exists()
