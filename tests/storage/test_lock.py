"""A lock lets one process in, names who is there, and knows which holders have ended."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import asdict, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage import lock
from llm2vec_ds.storage.lock import Busy, Holder, held

FORK = multiprocessing.get_context("fork")
OTHER_HOST = Holder("node-of-others", 4711, "2026-11-27T12:00:00+00:00", job="17", restarts=0)


def _hold(file: Path, holds: Event, may_end: Event) -> None:
    with held(file, "run"):
        holds.set()
        may_end.wait(60)


def _holding_process(file: Path) -> tuple[multiprocessing.process.BaseProcess, Event]:
    holds, may_end = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(file, holds, may_end))
    process.start()
    assert holds.wait(60)
    return process, may_end


def _write(file: Path, holder: Holder) -> None:
    file.write_text(json.dumps(asdict(holder)))


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process, may_end = _holding_process(tmp_path / "lock")
    with pytest.raises(
        UserError, match=f"run: another process is using it \\(process {process.pid} on "
    ) as told:
        held(tmp_path / "lock", "run").__enter__()
    assert "has ended" not in str(told.value)  # its flock says that it has not
    may_end.set()
    process.join()
    assert not (tmp_path / "lock").exists()
    with held(tmp_path / "lock", "run"):
        pass


def test_a_patient_process_waits_for_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, may_end = _holding_process(tmp_path / "lock")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            may_end.set()
            process.join()

    monkeypatch.setattr("llm2vec_ds.storage.lock.time.sleep", sleep)
    with caplog.at_level("INFO"), held(tmp_path / "lock", "run", wait=True):
        assert len(looks) == 3
    assert caplog.text.count("run: waiting for another process that uses it") == 1


def test_a_patient_process_does_not_wait_for_one_that_may_be_gone(tmp_path: Path) -> None:
    _write(tmp_path / "lock", OTHER_HOST)
    with pytest.raises(UserError, match="If that process has ended, remove"):
        held(tmp_path / "lock", "run", wait=True).__enter__()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with held(tmp_path / "lock", "run"), pytest.raises(UserError, match="another process is using it"):
        held(tmp_path / "lock", "run").__enter__()


def test_an_error_inside_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "lock", "run"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "lock").exists()


def test_a_killed_holder_of_this_host_is_followed(tmp_path: Path) -> None:
    process, _ = _holding_process(tmp_path / "lock")
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "lock").exists()
    with held(tmp_path / "lock", "run"):
        own = Holder.parse((tmp_path / "lock").read_text())
        assert own is not None
        assert own.pid == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_a_process_that_was_killed_before_it_wrote_its_name_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "NAMELESS_WAIT_S", 0.01)
    for begun in ("", '{"ho', '{"host": "node-of-oth'):
        (tmp_path / "lock").write_text(begun)
        with held(tmp_path / "lock", "run"):
            pass


def test_another_hosts_lock_is_left_alone_and_explained(tmp_path: Path) -> None:
    _write(tmp_path / "lock", OTHER_HOST)
    with pytest.raises(UserError) as refused:
        held(tmp_path / "lock", "run").__enter__()
    assert "process 4711 on node-of-others, SLURM job 17, since 2026-11-27T12:00:00+00:00" in str(
        refused.value
    )
    assert f"If that process has ended, remove {tmp_path / 'lock'}" in str(refused.value)
    assert Holder.parse((tmp_path / "lock").read_text()) == OTHER_HOST


@pytest.mark.parametrize(("job", "restarts", "follows"), [("17", 1, True), ("17", 0, False)])
def test_a_restart_of_the_same_slurm_job_follows_on_another_host(
    job: str, restarts: int, follows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was lost cannot remove its lock, and SLURM has ended that attempt."""
    _write(tmp_path / "lock", OTHER_HOST)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    if follows:
        with held(tmp_path / "lock", "run"):
            pass
    else:
        with pytest.raises(UserError, match="another process is using it"):
            held(tmp_path / "lock", "run").__enter__()


@pytest.mark.parametrize(
    ("says", "cluster", "follows"),
    [
        ("echo COMPLETED", "own", True),
        ("echo PENDING", "own", True),
        ("true", "own", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "own", True),
        ("echo RUNNING", "own", False),
        ("echo COMPLETING", "own", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "own", False),
        ("exit 127", "own", False),
        ("echo COMPLETED", "another", False),
    ],
)
def test_slurm_is_asked_whether_another_job_has_ended(
    says: str, cluster: str, follows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cancelled and submitted again, on another node."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --format=%T --jobs=17" ] || exit 9\n{says}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "own")
    _write(tmp_path / "lock", replace(OTHER_HOST, cluster=cluster))
    if follows:
        with held(tmp_path / "lock", "run"):
            pass
    else:
        with pytest.raises(Busy, match="another process is using it") as refused:
            held(tmp_path / "lock", "run").__enter__()
        assert refused.value.is_alive == (says in ("echo RUNNING", "echo COMPLETING"))


def test_where_the_file_system_has_no_flock_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    _write(tmp_path / "lock", Holder.this_process())
    with pytest.raises(UserError, match="another process is using it"):
        held(tmp_path / "lock", "run").__enter__()
    _write(tmp_path / "lock", replace(Holder.this_process(), pid=2**22 + 1))  # there is none above 2**22
    with held(tmp_path / "lock", "run"):
        pass


@pytest.mark.parametrize(
    "content", ["a thesis", '{"pid": 3}', '{"host": 3, "pid": "x", "since": ""}', "[" * 5000]
)
def test_a_file_that_is_no_lock_is_left_alone(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "NAMELESS_WAIT_S", 0.01)
    (tmp_path / "lock").write_text(content)
    with pytest.raises(UserError, match="a process without a name"):
        held(tmp_path / "lock", "run").__enter__()
    assert (tmp_path / "lock").read_text() == content


def test_who_makes_the_file_and_comes_second_leaves_it_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the file and its flock another process may get the flock."""
    monkeypatch.setattr(lock, "_flock", lambda descriptor: False)
    with pytest.raises(UserError, match="another process is using it"):
        held(tmp_path / "lock", "run").__enter__()
    assert (tmp_path / "lock").exists()


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_write", full)
    with pytest.raises(UserError, match="run cannot be written: No space left on device"):
        held(tmp_path / "lock", "run").__enter__()
    assert not (tmp_path / "lock").exists()
