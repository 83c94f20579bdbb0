"""Functions on several gloo ranks of this machine."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A port below those that the system hands to clients (from 32768), so that none takes it meanwhile, and
    that `slurm/common.sh` gives to jobs (from 20000)."""
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


def _enter(rank: int, world: int, port: int, function: Callable[[int, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(rank, world), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[[int, int], Any], world: int) -> list[Any]:
    """`function(rank, world)` on each rank, at module level of a test file; results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, args=(world, free_port(), function, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
