"""Stops a run when asked. A signal or a file sets a flag, the ranks agree on it, and the step's end saves."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

from llm2vec_ds.errors import Stopped, is_first_rank, say
from llm2vec_ds.process.interrupts import HANDED_ON_S, catch, restore

log = logging.getLogger(__name__)

Signal = Literal["USR1", "USR2", "TERM", "INT", "HUP"]
DEFAULT_SIGNALS: list[Signal] = ["USR1", "TERM"]
"""SLURM sends USR1 before a job's end (`--signal`), and TERM to end or preempt a job."""
STOP_FILE = "STOP"
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C, and a closed terminal."""


class StopRequest:
    """Knows whether this process was asked to stop. The signal handler only sets a flag. It saves nothing."""

    def __init__(self, folder: Path) -> None:
        self._stop_file = folder / STOP_FILE
        self.cause = ""
        self._announced_at: float | None = None

    def seen(self, *, look_for_file: bool) -> bool:
        """Returns True after the first signal, or if the run's folder holds a file STOP."""
        if not self.cause and look_for_file and self._stop_file.exists():
            self.cause = f"the file {self._stop_file}"
        return bool(self.cause)

    def stopped(self, where: str) -> Stopped:
        """Returns the exception that ends a run which was asked to stop."""
        cause = self.cause or "a signal to another rank"
        go_on = "run the same command with resume=true to go on"
        if "STOPPED_NOTE" in os.environ:  # slurm/train_7b.sh adds resume=true itself
            go_on = "the job goes on from here when SLURM runs it again, or when you submit it again"
        return Stopped(f"stopped by {cause} {where}: {go_on}")

    @contextmanager
    def listening(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, catches the signals of these names (`USR1`, `TERM` …), except those of a terminal.

        It also catches signals that were ignored before. A second signal changes nothing.
        """
        named = {signal.Signals[f"SIG{name}"] for name in names}
        before = {number: signal.signal(number, self._note) for number in named.difference(OF_A_TERMINAL)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the steps: Ctrl-C or a closed terminal also asks to stop, and a line says so at once.

        A second Ctrl-C ends the process. Signals that were ignored stay ignored.
        """
        before = catch(OF_A_TERMINAL, self._note)
        try:
            with _heard_at_once(self._tell_or_end):
                yield
        finally:
            restore(before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.cause = self.cause or signal.Signals(number).name

    def _tell_or_end(self, number: int) -> None:
        if number not in OF_A_TERMINAL:
            return
        now = time.monotonic()
        if self._announced_at is None:
            self._announced_at = now
            self._say("stopping after this step; press Ctrl-C again to end at once without saving")
        elif number == signal.SIGINT and now - self._announced_at > HANDED_ON_S:
            self._say("ended at once, the last checkpoint is kept: run the same command with resume=true")
            os._exit(128 + number)

    def _say(self, words: str) -> None:
        if is_first_rank():
            say(f"llm2vec-ds: {words}")


@contextmanager
def _heard_at_once(hear: Callable[[int], None]) -> Iterator[None]:
    """Calls `hear` in a separate thread with the number of each caught signal.

    Handlers in the main thread have to wait for a long operation, such as a backward pass or a collective
    that never ends.
    """
    receiver, sender = socket.socketpair()

    def listen() -> None:
        while numbers := receiver.recv(64):
            for number in numbers:
                hear(number)

    sender.setblocking(False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        receiver.close()
