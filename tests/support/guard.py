"""`python guard.py COMMAND…`: a command that does not outlive whoever holds this process's standard input.

When the input ends, by a close or because its holder died, the command's whole process group ends too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE_S = 5


def main(command: list[str]) -> int:
    """Returns the command's exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(child.pid,), daemon=True).start()
    code = child.wait()
    _end(child.pid)
    return code


def _end_with_input(group: int) -> None:
    while os.read(0, 4096):  # not by sys.stdin, whose lock would be held when Python ends
        pass
    _end(group)


def _end(group: int) -> None:
    """Politely, then not; returns when nobody of the group is left."""
    until = time.monotonic() + PATIENCE_S
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < until:
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
