"""Runs a command of this package in a separate process, so that its memory is free afterwards."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from llm2vec_ds.errors import UserError
from llm2vec_ds.process.interrupts import Interrupted

log = logging.getLogger(__name__)


def train_in_child(recipe: Path, *overrides: str) -> None:
    """Runs `llm2vec-ds train` on a recipe file.

    Raises:
        UserError: training failed. The command has said why.
        Interrupted: as `run_command`.
    """
    log.info("llm2vec-ds train %s", " ".join([str(recipe), *overrides]))
    if run_command("train", str(recipe), *overrides):
        raise UserError(f"training stopped (see above): repeat it with llm2vec-ds train {recipe}")


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
