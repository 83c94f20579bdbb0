"""Ports of this host that are free now, and that neither the system nor `slurm/common.sh` hands out."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Below those that the system gives to clients (from 32768) and the scripts to jobs (from 20000)."""
    return free_ports(1)[0]


def free_ports(n: int) -> list[int]:
    """As many, all different."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 20_000), 5_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == n:
            return ports
    raise RuntimeError(f"no {n} free ports from 15000 to 19999")
