"""Stopping when asked: a signal or a file sets a flag, ranks agree on it, and the step's end saves."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

STOP_FILE = "STOP"


class StopRequest:
    """Whether this process has been asked to stop. Nothing is saved in a signal handler: it sets a flag."""

    def __init__(self, folder: Path) -> None:
        self._stop_file = folder / STOP_FILE
        self.cause = ""

    def seen(self, *, look_for_file: bool) -> bool:
        """True from the first signal on, or while the run's folder holds a file STOP."""
        if not self.cause and look_for_file and self._stop_file.exists():
            self.cause = f"the file {self._stop_file}"
        return bool(self.cause)

    @contextmanager
    def listening(self, names: Sequence[str]) -> Iterator[None]:
        """Catches the signals of these names (`USR1`, `TERM` …); a second one changes nothing."""
        numbers = [signal.Signals[f"SIG{name}"] for name in names]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.cause = self.cause or signal.Signals(number).name
