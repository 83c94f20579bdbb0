"""Ranks and the few collectives that losses need; each works without a process group as one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: `rank` of `world_size`, device number `local_rank` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """From the variables of deepspeed/torchrun, else of a SLURM job step, else one process.

    Raises:
        UserError: only some of RANK, WORLD_SIZE and LOCAL_RANK are set, or they contradict each other.
    """
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    given = [name for name in launcher if name in environment]
    if given and len(given) < len(launcher):
        missing = sorted(set(launcher) - set(given))
        raise UserError(f"{', '.join(given)} set without {', '.join(missing)}: set all three or none")
    if given:
        names = launcher
    elif "SLURM_STEP_ID" in environment and all(name in environment for name in slurm):
        names = slurm
    else:
        return Ranks()
    try:
        ranks = Ranks(*(int(environment[name]) for name in names))
    except ValueError:
        values = ", ".join(f"{name}={environment[name]}" for name in names)
        raise UserError(f"rank variables must be whole numbers: {values}") from None
    if not 0 <= ranks.rank < ranks.world_size:
        raise UserError(f"rank {ranks.rank} is not below the world size {ranks.world_size}")
    return ranks


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Writes the variables that torch.distributed and DeepSpeed read.

    Without them a plain process makes DeepSpeed look for MPI.

    Raises:
        UserError: several ranks, and no launcher has said where rank 0 is.
    """
    environment["RANK"] = str(ranks.rank)
    environment["WORLD_SIZE"] = str(ranks.world_size)
    environment["LOCAL_RANK"] = str(ranks.local_rank)
    if ranks.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError("several ranks need MASTER_ADDR and MASTER_PORT: the node and port of rank 0")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, without gradient; a new tensor."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max_int(value: int, device: torch.device) -> int:
    """Largest value over ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def all_gather_object(value: Any) -> list[Any]:
    """One small Python value of each rank, in rank order (pickled: for messages, not for data)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, `[N_all, ...]`; ranks may hold different numbers of rows.

    Differentiable: a rank's rows receive the sum of the gradients that all ranks have for them.
    """
    if world_size() == 1:
        return x_ND
    return _GatherRows.apply(x_ND)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor) -> torch.Tensor:
        counts = [int(n) for n in all_gather_object(len(x_ND))]
        padded = x_ND.new_zeros(max(counts), *x_ND.shape[1:])
        padded[: len(x_ND)] = x_ND
        blocks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(blocks, padded)
        ctx.first_row, ctx.n_rows = sum(counts[: rank()]), len(x_ND)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.first_row : ctx.first_row + ctx.n_rows]
