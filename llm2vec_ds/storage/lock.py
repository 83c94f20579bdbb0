"""One writer at a time: a lock file that names its holder, for processes of one host and of several.

Only one process can make the file, on a shared file system too. Its holder also keeps an flock on it, which
the system drops when the process ends. So a host knows which of its own locks are left over. Of another host
only SLURM can tell: it has started the same job again, or the holder's job does not run any more.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.storage.reading import checked_json

log = logging.getLogger(__name__)

NAMELESS_WAIT_S = 1.0
"""A process writes its name into the file that it has just made long before this."""
WAIT_S = 0.2
"""Between two looks at a lock that another process holds."""
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
"""States of a SLURM job whose processes may be there; a pending one's are not."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `job`, `restarts` and `cluster` are SLURM's, where it started the process."""

    host: str
    pid: int
    since: str
    job: str | None = None
    restarts: int = 0
    cluster: str | None = None

    @classmethod
    def this_process(cls, environment: Mapping[str, str] = os.environ) -> Holder:
        return cls(
            socket.gethostname(),
            os.getpid(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            environment.get("SLURM_JOB_ID"),
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            environment.get("SLURM_CLUSTER_NAME"),
        )

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """None: the text is not what a holder writes."""
        try:
            return checked_json(text.encode(), cls)
        except ValueError:
            return None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class Busy(UserError):
    """Another process works there.

    Attributes:
        is_alive: it is known to run.
    """

    def __init__(self, message: str, *, is_alive: bool) -> None:
        super().__init__(message)
        self.is_alive = is_alive


@contextmanager
def held(file: Path, what: object, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock `file` over `what`; its folder must be there.

    Args:
        wait: for a process that holds it and is known to run.

    Raises:
        Busy: another process holds it, or may do so on another host; names it.
        UserError: the file cannot be made.
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
                log.info("%s: waiting for another process that works there", what)
        waiting = True
        time.sleep(WAIT_S)


def _acquire(file: Path, what: object) -> int:
    while True:
        descriptor, is_new = _open(file)
        try:
            if (is_ours := _flock(descriptor)) is False:
                raise _busy(file, what, _read(descriptor), is_alive=True)
            if not _is_at(file, descriptor):  # its holder has removed it in between
                os.close(descriptor)
                continue
            if not is_new:
                _take_over(file, descriptor, what, has_flock=bool(is_ours))
        except BaseException:  # the file stays: another process may hold it, even where this one made it
            os.close(descriptor)
            raise
        try:
            _write(descriptor, Holder.this_process())
        except BaseException:
            _release(file, descriptor)
            raise
        return descriptor


def _open(file: Path) -> tuple[int, bool]:
    """The file, and whether this process made it."""
    while True:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                return os.open(file, os.O_RDWR), False
            except FileNotFoundError:  # it has just been released
                continue


def _flock(descriptor: int) -> bool | None:
    """Whether this process has the flock now; None: the file system has none."""
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
    """Returns if the file's holder is known to have ended.

    Raises:
        UserError: it is not.
    """
    text = _read(descriptor)
    if Holder.parse(text) is None:
        time.sleep(NAMELESS_WAIT_S)
        text = _read(descriptor)
    holder, own = Holder.parse(text), Holder.this_process()
    if holder is None:
        ended: bool | None = has_flock and _is_begun(text)  # killed before it could write its name
    elif holder.host == own.host:
        ended = has_flock or not _is_running(holder.pid)
    else:
        ended = _slurm_has_ended(holder, own)
    if not ended:
        is_alive = holder is not None and holder.host != own.host and ended is False  # so says SLURM
        raise _busy(file, what, text, is_alive=is_alive)
    log.info("%s: taking over from %s, which has ended", what, holder or "a process")


def _slurm_has_ended(holder: Holder, own: Holder) -> bool | None:
    """Whether the holder's job, of this cluster, has ended; None where SLURM cannot say."""
    if holder.job is None or own.job is None or holder.cluster != own.cluster:
        return None
    if holder.job == own.job:
        return own.restarts > holder.restarts
    line = ["squeue", "--noheader", "--format=%T", f"--jobs={holder.job}"]
    try:
        asked = subprocess.run(line, capture_output=True, text=True, timeout=SQUEUE_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode:  # a job is forgotten some minutes after its end
        return True if "Invalid job id" in asked.stderr else None
    return not set(asked.stdout.split()) & WORKING


def _is_begun(text: str) -> bool:
    """Is it the beginning, or nothing, of what a holder writes?"""
    return text[: len(BEGINNING)] == BEGINNING[: len(text)]


def _is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def _busy(file: Path, what: object, text: str, *, is_alive: bool) -> Busy:
    holder = Holder.parse(text) or "a process that has not said its name"
    doubt = "" if is_alive else f". If that process has ended, remove {file} and run this again"
    return Busy(
        f"{what}: another process works there ({holder}): wait for it, or choose another place{doubt}",
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
    except OSError as error:  # the work is done, and the next process finds that this one has ended
        log.warning("%s cannot be removed: %s", file, error.strerror)
    finally:
        os.close(descriptor)
