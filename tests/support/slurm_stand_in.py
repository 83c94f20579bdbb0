#!/usr/bin/env python3
"""In the place of Python in `slurm/train_7b.sh`, to test the batch shell alone: quick, and fails as told.

STAND_IN=finishes   runs 0.5 s
STAND_IN=saves      stops as asked
STAND_IN=starts     rank 1 is ended by a signal, as a Python that has just started; rank 0 is deaf
STAND_IN=imports    is deaf for 3 s first, as a process that is still importing, then stops as asked
STAND_IN=error      rank 1 ends with an error, rank 0 notices
STAND_IN=crash      rank 1 is killed by a signal
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN_FOLDER"])


def rank(number: int, mode: str) -> int:
    asked: list[int] = []
    is_deaf = mode in ("starts", "imports")
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN if is_deaf else lambda number, _: asked.append(number))
    if mode == "starts" and number == 1:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (FOLDER / f"started-{number}").touch()
    if mode == "imports":
        time.sleep(3)
        signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
    ends = time.monotonic() + (0.5 if mode == "finishes" else 60)
    while time.monotonic() < ends:
        time.sleep(0.1)
        if number == 1 and not (FOLDER / "started-0").exists():
            continue  # srun ends the others of a rank that failed: rank 0 has to listen by then
        if mode == "error" and number == 1:
            print("llm2vec-ds: error: the disk is full: free some space", file=sys.stderr)
            return 2
        if mode == "error":
            print("llm2vec-ds: error: step 2: rank 0 has lost another rank", file=sys.stderr)
            time.sleep(0.5)
            return 2
        if mode == "crash" and number == 1:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if asked and mode != "crash":  # the step that srun ends, since a rank is gone: nothing can be saved
            Path(os.environ["STOPPED_NOTE"]).touch()
            return 0
    return 0


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1].endswith("run_facts.py"):
        print(f"output_dir={FOLDER}\naddress=127.0.0.1")
        sys.exit()
    # A restarted job has nothing left to do.
    sys.exit(
        0
        if "SLURM_RESTART_COUNT" in os.environ
        else rank(int(os.environ["SLURM_PROCID"]), os.environ["STAND_IN"])
    )
