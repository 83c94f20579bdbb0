"""Ranks and the few collectives that losses need; each works without a process group as one rank."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm2vec_ds.errors import UserError
from llm2vec_ds.process.environment import set_variables

T = TypeVar("T")


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
    values = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    shown = {name: str(value) for name, value in values.items()}
    set_variables(shown, "torch.distributed and DeepSpeed", environment)
    if ranks.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError("several ranks need MASTER_ADDR and MASTER_PORT: the node and port of rank 0")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextmanager
def meeting(ranks: Ranks) -> Iterator[None]:
    """What torch says when ranks do not find each other, in words.

    Raises:
        UserError: in place of what torch.distributed raises inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_collectives(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} does not meet the others at {place} "
            f"({_one_line(error)}): start every rank, each with this MASTER_ADDR and a MASTER_PORT that is "
            "free on rank 0's node and open to the others"
        ) from None


def leave() -> None:
    """The last thing that a process does with its group: torch warns of one that ends without it."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def contact(doing: str) -> Iterator[None]:
    """What a failed collective says, in words.

    Raises:
        UserError: a collective inside failed, most often because another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _is_of_collectives(error):
            raise
        said = _one_line(error)
        what = f"rank {rank()} has lost another rank" if _GONE.search(said) else "a collective has failed"
        raise UserError(
            f"{doing}: {what} ({said}). The first error line above, or in the other ranks' logs, is the "
            "cause: fix it and run again with resume=true"
        ) from None


_GONE = re.compile(r"clos|reset|refused|timed? ?out|remote|broken pipe", re.IGNORECASE)


def _is_of_collectives(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _one_line(error: Exception) -> str:
    """The last error where NCCL names one, else the beginning."""
    return " ".join(str(error).rpartition("Last error:")[2].split())[:240]


class Traffic:
    """Bytes that this process has sent in collectives since it started, by kind.

    A statistic of the process, as the memory peak is: it only grows, and whoever wants a step's share takes
    a difference. With W ranks and a message of n bytes (an all-gather's: the gathered whole; a
    reduce-scatter's: the whole before), a rank of a ring sends 2n(W−1)/W for an all-reduce, n(W−1)/W for
    an all-gather, a reduce-scatter or an all-to-all, and n for a broadcast or a point-to-point message
    (Thakur et al., 2005, section 4). A collective library that takes another way sends as much or less.
    """

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()

    def note(self, kind: str, n_bytes: int, n_ranks: int) -> None:
        """Adds one collective over `n_ranks` with a message of `n_bytes`."""
        factor = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}.get(kind)
        self.sent_bytes[kind] += n_bytes if factor is None else factor * n_bytes * (n_ranks - 1) // n_ranks


TRAFFIC = Traffic()


def _note(kind: str, *tensors: torch.Tensor) -> None:
    TRAFFIC.note(kind, sum(t.numel() * t.element_size() for t in tensors), world_size())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, without gradient; a new tensor."""
    value = value.detach().clone()
    if world_size() > 1:
        _note("all_reduce", value)
        dist.all_reduce(value)
    return value


def all_reduce_max_int(value: int, device: torch.device) -> int:
    """Largest value over ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    _note("all_reduce", tensor)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def on_any_rank(flag: torch.Tensor) -> bool:
    """Is a bool scalar true on any rank? Waits for the device."""
    if world_size() == 1:
        return bool(flag)
    found = flag.to(torch.uint8)
    _note("all_reduce", found)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def all_gather_object(value: Any) -> list[Any]:
    """One small Python value of each rank, in rank order (pickled: for messages, not for data)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns here; one rank's mistake is everyone's, so that none waits for it in vain."""
    mistake = ""
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    if mistakes := [said for said in all_gather_object(mistake) if said]:
        raise UserError(mistakes[0])
    return result


def broadcast_object(value: Any) -> Any:
    """Rank 0's Python value on every rank (pickled)."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_counts(value: int, device: torch.device) -> list[int]:
    """One whole number of each rank, in rank order."""
    if world_size() == 1:
        return [value]
    counts = torch.empty(world_size(), 1, dtype=torch.int64, device=device)
    _note("all_gather", counts)
    dist.all_gather(list(counts), torch.tensor([value], device=device))
    return [int(count) for count in counts.flatten().tolist()]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The tensor of the rank before, while this rank's goes to the next; of one shape, without gradient."""
    if world_size() == 1:
        return x
    received = torch.empty_like(x)
    _note("send", x)
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    requests = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x.contiguous(), after), dist.P2POp(dist.irecv, received, before)]
    )
    for request in requests:
        request.wait()
    return received


def gather_rows(x_ND: torch.Tensor, wire_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows of all ranks in rank order, `[N_all, ...]`; ranks may hold different numbers of rows.

    Differentiable: a rank's rows receive the sum of the gradients that all ranks have for them.

    Args:
        wire_dtype: rows are rounded to it, with one rank too, so that the result does not depend on their
            number; gradients are summed in `x_ND`'s own dtype.
    """
    gathered: torch.Tensor = _GatherRows.apply(x_ND, wire_dtype or x_ND.dtype)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, wire_dtype: torch.dtype) -> torch.Tensor:
        ctx.n_rows = len(x_ND)
        rounded = x_ND.to(wire_dtype)
        if world_size() == 1:
            return rounded.to(x_ND.dtype, copy=True)
        ctx.counts = counts = all_gather_counts(len(x_ND), x_ND.device)
        padded = rounded.new_zeros(max(counts), *x_ND.shape[1:])
        padded[: len(x_ND)] = rounded
        whole = padded.new_empty(len(counts), *padded.shape)
        _note("all_gather", whole)
        dist.all_gather(list(whole), padded)
        return torch.cat([block[:count] for block, count in zip(whole, counts, strict=True)]).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if world_size() == 1:
            return gradient, None
        n_most = max(ctx.counts)
        padded = gradient.new_zeros(len(ctx.counts), n_most, *gradient.shape[1:])
        for block, rows in zip(padded, gradient.split(ctx.counts), strict=True):
            block[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        _note("reduce_scatter", padded)
        dist.reduce_scatter(own, list(padded))
        return own[: ctx.n_rows], None
