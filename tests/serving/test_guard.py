"""What a guard runs ends with it: after its block, and where its holder is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.servers import GUARD, guarded

SERVER = ["bash", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]
"""Deaf to a polite end, with a child of its own."""
HOLDER = (
    "import subprocess, sys, time;"
    "subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True); time.sleep(1000)"
)


def family(pid: int, n: int) -> list[psutil.Process]:
    """All `n` processes below this one, once they are there."""
    for _ in range(300):
        if len(found := psutil.Process(pid).children(recursive=True)) == n:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{n} processes were expected: {found}")


def test_nothing_is_left_after_the_block(tmp_path: Path) -> None:
    with guarded(SERVER, dict(os.environ), tmp_path / "log.txt") as guard:
        everything = family(guard.pid, 3)
    assert not psutil.wait_procs(everything, timeout=1)[1]


def test_nothing_is_left_where_the_holder_is_killed() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, sys.executable, str(GUARD), *SERVER])
    everything = family(holder.pid, 4)
    holder.kill()
    holder.wait()
    assert not psutil.wait_procs(everything, timeout=60)[1]
