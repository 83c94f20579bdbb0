"""Ctrl-C, SIGTERM and a closed terminal raise one exception: a command cleans up and says what it keeps."""

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
"""A launcher hands a signal on to processes that have had it from the terminal: within this time, it is the
same one."""


class Interrupted(BaseException):
    """A signal ends this command. No Exception, so that no library takes it for its own failure.

    Attributes:
        kept: what is kept, and how to go on; empty where there is nothing to say.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(number)
        self.number = number
        self.kept = kept

    @property
    def exit_code(self) -> int:
        """What a shell makes of a process that this signal ends."""
        return 128 + self.number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}: {self.kept}" if self.kept else f"stopped by {name}"


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Around a command's work, or as its decorator: what it keeps when a signal ends it. The innermost
    counts.

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
    """Inside, signals of ENDING raise `Interrupted` in the main thread. Ignored ones stay ignored, such as
    SIGHUP under `nohup`."""
    raise_first = _RaiseFirst()
    before = catch(ENDING, raise_first)
    try:
        yield
    finally:
        restore(before)


def catch(numbers: Iterable[signal.Signals], handler: Any) -> dict[signal.Signals, Any]:
    """Sets the handler of those that are not ignored; returns the earlier handlers, which `restore` takes."""
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def ignore_ending_signals() -> None:
    """From now on nothing is left that they could end."""
    catch(ENDING, signal.SIG_IGN)


class _RaiseFirst:
    """The first signal raises; a later one does not disturb the cleaning up, or ends it at once."""

    def __init__(self) -> None:
        self._raised_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._raised_at is None:
            self._raised_at = now
            raise Interrupted(number)
        if now - self._raised_at > HANDED_ON_S:
            os._exit(128 + number)
