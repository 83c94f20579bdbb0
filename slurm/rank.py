"""One rank of a job step: `python slurm/rank.py ARGUMENTS` runs `llm2vec-ds ARGUMENTS` under SLURM.

Signals are ignored until the run handles them, because they would end a process that is still importing. The
batch shell repeats its signal. A rank that stopped as asked (exit code 75) ends with 0. Otherwise srun would
take it for a failure and kill the other ranks. The rank tells the batch shell by a file, which STOPPED_NOTE
names.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def run() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from llm2vec_ds.__main__ import main
    from llm2vec_ds.errors import Stopped
    from llm2vec_ds.network import interface_towards

    # Without a named interface, gloo takes the address of the host's name, or the loopback.
    towards_rank_0 = interface_towards(os.environ["MASTER_ADDR"])
    if towards_rank_0 is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", towards_rank_0)
    try:
        main()
    except SystemExit as ends:
        if ends.code != Stopped.EXIT_CODE:
            raise
        Path(os.environ["STOPPED_NOTE"]).touch()
        sys.exit(0)


if __name__ == "__main__":
    run()
