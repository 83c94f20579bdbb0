"""Runs a command of this package in a separate process, so that its memory is free afterwards."""

from __future__ import annotations

import subprocess
import sys

from llm2vec_ds.process.interrupts import Interrupted


def run_command(*arguments: str) -> int:
    """Runs `llm2vec-ds ARGUMENTS`. Returns its exit code.

    Raises:
        Interrupted: a signal asked this process to end. The command also got it, and has saved and ended.
    """
    with subprocess.Popen([sys.executable, "-m", "llm2vec_ds", *arguments]) as command:
        try:
            return command.wait()
        except Interrupted as interrupted:
            command.send_signal(interrupted.number)
            command.wait()
            raise
