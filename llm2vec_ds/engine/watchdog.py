"""Ends a run that hangs. A rank whose step takes too long reports it and stops, whatever it waits for."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2vec_ds.distributed import rank, world_size
from llm2vec_ds.errors import say

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class Watchdog:
    """Watches one piece of work at a time, from its own thread, because a collective cannot be interrupted.

    Args:
        timeout_s: the longest time for one step, measurement or save. 0 turns the watchdog off.
        folder: where the stacks of a hanging process are written.
    """

    def __init__(self, timeout_s: float, folder: Path) -> None:
        self._timeout_s = timeout_s
        self._folder = folder
        self._doing = ""
        self._deadline: float | None = None
        self._ends = False
        self._changed = threading.Condition()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Runs the watching thread. `begin` tells it what is being done."""
        if not self._timeout_s:
            yield
            return
        self._ends = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._ends = True
                self._changed.notify()
            self._thread.join()

    def begin(self, doing: str) -> None:
        """Starts the time for `doing`."""
        with self._changed:
            self._doing = doing
            self._deadline = time.monotonic() + self._timeout_s
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ends:
                now = time.monotonic()
                if self._deadline is not None and now >= self._deadline:
                    self._stop_process()
                self._changed.wait(None if self._deadline is None else self._deadline - now)

    def _stop_process(self) -> None:
        stacks = self._folder / f"hang-rank-{rank()}.txt"
        try:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks in {stacks}"
        except OSError as error:  # a full disk must not keep the run hanging
            where = f"no stacks: {stacks} cannot be written, {error.strerror}"
        say(
            f"llm2vec-ds: error: {self._doing} on rank {rank()} of {world_size()} ({socket.gethostname()}) "
            f"has taken more than {self._timeout_s:g} s ({self._place()}; {where}). Another rank "
            "hangs or has died: look for a rank at another place, then run again with resume=true. Raise "
            "step_timeout_s if a step does take that long"
        )
        os._exit(EXIT_CODE)  # not sys.exit: the main thread may wait in a collective for ever

    def _place(self) -> str:
        """Names the innermost function of this package that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        for entry in reversed(traceback.extract_stack(frame)):
            if "llm2vec_ds" in entry.filename:
                return f"in {entry.name}, {Path(entry.filename).name}:{entry.lineno}"
        return "outside of this package"
