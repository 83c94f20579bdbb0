"""File operations that the toolkit itself makes: counted, and with a fault before any of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

WRITES = ("write", "pwrite")
OPERATIONS = (*WRITES, "fsync", "rename", "link", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank.

    Attributes:
        rank: where.
        kind: `kill` (SIGKILL) or `full` (no space left) at a file operation, `hang`, `nan`, `memory` in a
            step, `signal` (USR1 to itself) in a step, `absent` (SIGKILL) once the ranks have met.
        at: number of the file operation, or of the step, counted from 0; or the first operation of a phase,
            such as `write:1`: how many come before it differs a little from run to run.
        half: a write is cut in the middle instead of before its first byte.
    """

    rank: int
    kind: str
    at: int | str = 0
    half: bool = False


class Operations:
    """From now on every operation of this process is counted, and `fault` comes before the chosen one.

    Attributes:
        phase: what the process is at; set by whoever knows.
        seen: `KIND:PHASE` of each operation so far.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        from llm2vec_ds.storage import durable

        self.fault = fault
        self.phase = "start"
        self.seen: list[str] = []
        for kind in OPERATIONS:
            setattr(os, kind, self._wrapped(kind, getattr(os, kind)))
        durable._exchanged = self._wrapped("exchange", durable._exchanged)

    def _wrapped(self, kind: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if _is_own(sys._getframe(1)):
                self._count(kind, operation, arguments)
            return operation(*arguments, **keywords)

        return run

    def _count(self, kind: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        fault, name = self.fault, f"{kind}:{self.phase}"
        here = (len(self.seen), None if name in self.seen else name)
        self.seen.append(name)
        if fault is None or fault.kind not in ("kill", "full") or fault.at not in here:
            return
        if fault.half and kind in WRITES:
            descriptor, content, *rest = arguments
            operation(descriptor, content[: len(content) // 2], *rest)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, os.strerror(28))


def _is_own(frame: FrameType | None) -> bool:
    """Whether the toolkit itself called, perhaps through a library function."""
    for _ in range(3):
        if frame is None or frame.f_globals["__name__"].startswith("llm2vec_ds."):
            return frame is not None
        frame = frame.f_back
    return False
