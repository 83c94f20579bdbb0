"""Functions on several gloo ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.forked import enter, rank_environment, server
from tests.support.ports import free_port


def _enter(
    rank: int, environments: list[dict[str, str]], function: Callable[[int, int], Any], folder: str
) -> None:
    world = len(environments)
    enter(environments[rank])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(rank, world), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[[int, int], Any], world: int) -> list[Any]:
    """`function(rank, world)` on each rank, at module level of a test file; results in rank order."""
    start_method = server().get_start_method()
    port = free_port()
    environments = [rank_environment(rank, world, port) for rank in range(world)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (environments, function, folder)
        mp.start_processes(_enter, arguments, nprocs=world, start_method=start_method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
