"""A lock file that lets one process write at a time, on one host or on several. It names its holder.

Only one process can create the file, also on a shared file system. The holder also keeps an flock on it,
which the system drops when the process ends. So a host knows which of its own locks are left over. For a lock
of another host, only SLURM can tell: either it has started the same job again, or the holder's job no longer
runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.storage.reading import checked_json

log = logging.getLogger(__name__)

NAMELESS_WAIT_S = 1.0
"""Seconds to wait for the holder's name in a lock file. A process writes it right after creating the file."""
WAIT_S = 0.2
"""Seconds between two checks of a lock that another process holds."""
BEGINNING = '{"host": "'
SQUEUE_WAIT_S = 30
WORKING = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "RESIZING",
    "STAGE_OUT",
}
"""States of a SLURM job that may have running processes. A pending job has none."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock. `job`, `restarts` and `cluster` are set if SLURM started it."""

    host: str
    pid: int
    since: str
    job: str | None = None
    restarts: int = 0
    cluster: str | None = None

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            socket.gethostname(),
            os.getpid(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            os.environ.get("SLURM_JOB_ID"),
            int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            os.environ.get("SLURM_CLUSTER_NAME"),
        )

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Reads what a holder wrote. Returns None for any other text."""
        try:
            return checked_json(text.encode(), cls)
        except ValueError:
            return None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class Busy(UserError):
    """Another process holds the lock.

    Attributes:
        is_alive: it is known that this process is running.
    """

    def __init__(self, message: str, *, is_alive: bool) -> None:
        super().__init__(message)
        self.is_alive = is_alive


@contextmanager
def held(file: Path, what: object, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock `file` for `what`. The folder of the file must exist.

    Args:
        wait: whether to wait for a holder that is known to be running.

    Raises:
        Busy: another process holds the lock, or may hold it on another host. The message names it.
        UserError: the file cannot be created.
    """
    with writing(what):
        descriptor = _acquire_patiently(file, what) if wait else _acquire(file, what)
    try:
        yield
    finally:
        _release(file, descriptor)


def _acquire_patiently(file: Path, what: object) -> int:
    waiting = False
    while True:
        try:
            return _acquire(file, what)
        except Busy as busy:
            if not busy.is_alive:
                raise
            if not waiting:
                log.info("%s: waiting for another process that uses it", what)
        waiting = True
        time.sleep(WAIT_S)


def _acquire(file: Path, what: object) -> int:
    while True:
        descriptor, is_new = _open(file)
        try:
            if (is_ours := _flock(descriptor)) is False:
                raise _busy(file, what, _read(descriptor), is_alive=True)
            if not _is_at(file, descriptor):  # the holder removed the file after we opened it
                os.close(descriptor)
                continue
            if not is_new:
                _take_over(file, descriptor, what, has_flock=bool(is_ours))
        except BaseException:  # the file stays, because another process may hold it even if we created it
            os.close(descriptor)
            raise
        try:
            _write(descriptor, Holder.this_process())
        except BaseException:
            _release(file, descriptor)
            raise
        return descriptor


def _open(file: Path) -> tuple[int, bool]:
    """Opens the file. Also returns whether this process created it."""
    while True:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                return os.open(file, os.O_RDWR), False
            except FileNotFoundError:  # its holder has just released it
                continue


def _flock(descriptor: int) -> bool | None:
    """Returns whether this process now has the flock. None: the file system has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


def _take_over(file: Path, descriptor: int, what: object, *, has_flock: bool) -> None:
    """Checks that the file's holder has ended.

    Raises:
        Busy: it may still be running.
    """
    text = _read(descriptor)
    if Holder.parse(text) is None:
        time.sleep(NAMELESS_WAIT_S)
        text = _read(descriptor)
    holder, own = Holder.parse(text), Holder.this_process()
    if holder is None:
        ended: bool | None = has_flock and _is_begun(text)  # it was killed before it wrote its name
    elif holder.host == own.host:
        ended = has_flock or not _is_running(holder.pid)
    else:
        ended = _slurm_has_ended(holder, own)
    if not ended:
        is_alive = holder is not None and holder.host != own.host and ended is False  # SLURM says so
        raise _busy(file, what, text, is_alive=is_alive)
    log.info("%s: taking over from %s, which has ended", what, holder or "a process")


def _slurm_has_ended(holder: Holder, own: Holder) -> bool | None:
    """Returns whether the holder's job in this cluster has ended. None: SLURM cannot tell."""
    if holder.job is None or own.job is None or holder.cluster != own.cluster:
        return None
    if holder.job == own.job:
        return own.restarts > holder.restarts
    line = ["squeue", "--noheader", "--format=%T", f"--jobs={holder.job}"]
    try:
        asked = subprocess.run(line, capture_output=True, text=True, timeout=SQUEUE_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode:  # SLURM forgets a job some minutes after its end
        return True if "Invalid job id" in asked.stderr else None
    return not set(asked.stdout.split()) & WORKING


def _is_begun(text: str) -> bool:
    """Returns whether the text is empty or the beginning of what a holder writes."""
    return text[: len(BEGINNING)] == BEGINNING[: len(text)]


def _is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def _busy(file: Path, what: object, text: str, *, is_alive: bool) -> Busy:
    holder = Holder.parse(text) or "a process without a name"
    doubt = "" if is_alive else f". If that process has ended, remove {file} and run this again"
    return Busy(
        f"{what}: another process is using it ({holder}): wait for it, or choose another place{doubt}",
        is_alive=is_alive,
    )


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 2**16, 0).decode(errors="replace")


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(asdict(holder))}\n".encode(), 0)
    os.fsync(descriptor)


def _release(file: Path, descriptor: int) -> None:
    try:
        if _is_at(file, descriptor):
            file.unlink()
    except OSError as error:  # no harm: the work is done, and the next process sees that this one has ended
        log.warning("%s cannot be removed: %s", file, error.strerror)
    finally:
        os.close(descriptor)
