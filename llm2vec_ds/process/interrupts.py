"""Turns Ctrl-C, SIGTERM and a closed terminal into one exception, so that a command can clean up.

The exception carries what the command keeps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDED_ON_S = 1.0
"""Seconds within which two signals count as one. A launcher forwards a signal to processes that already got
it from the terminal."""


class Interrupted(BaseException):
    """A signal ends this command. It is no `Exception`, so that no library catches it.

    Attributes:
        kept: what is kept and how to go on. Empty if there is nothing to say.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(number)
        self.number = number
        self.kept = kept

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by this signal."""
        return 128 + self.number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}: {self.kept}" if self.kept else f"stopped by {name}"


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Adds to an `Interrupted` from inside what the command keeps. Use it around work, or as a decorator.

    If several are nested, the innermost counts.

    Raises:
        Interrupted: the one raised inside, with `what`.
    """
    try:
        yield
    except Interrupted as interrupted:
        interrupted.kept = interrupted.kept or what
        raise


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, signals of ENDING raise `Interrupted` in the main thread.

    Signals that were ignored stay ignored, such as SIGHUP under `nohup`.
    """
    raise_first = _RaiseFirst()
    before = catch(ENDING, raise_first)
    try:
        yield
    finally:
        restore(before)


def catch(numbers: Iterable[signal.Signals], handler: Any) -> dict[signal.Signals, Any]:
    """Sets the handler of all signals that are not ignored. Returns the earlier handlers, for `restore`."""
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def ignore_ending_signals() -> None:
    """Ignores the signals of ENDING from now on, because the command is already ending."""
    catch(ENDING, signal.SIG_IGN)


class _RaiseFirst:
    """Raises at the first signal. A forwarded copy of it changes nothing. A later signal ends the process."""

    def __init__(self) -> None:
        self._raised_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._raised_at is None:
            self._raised_at = now
            raise Interrupted(number)
        if now - self._raised_at > HANDED_ON_S:
            os._exit(128 + number)
