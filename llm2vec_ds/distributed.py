"""Ranks, and the few collectives that losses need. Without a process group they act as one rank."""

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
    """This process is `rank` of `world_size`. On its node it uses device number `local_rank`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Reads the ranks from the variables of deepspeed or torchrun, else from those of a SLURM job step.

    Without any of these variables there is one process.

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
    """Sets the variables that torch.distributed and DeepSpeed read.

    If they are missing, DeepSpeed looks for MPI.

    Raises:
        UserError: there are several ranks, but no launcher set the address of rank 0.
    """
    values = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    shown = {name: str(value) for name, value in values.items()}
    set_variables(shown, "torch.distributed and DeepSpeed", environment)
    if ranks.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError("several ranks need MASTER_ADDR and MASTER_PORT: set the node and port of rank 0")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextmanager
def explain_failed_rendezvous(ranks: Ranks) -> Iterator[None]:
    """Explains torch's error when the ranks cannot connect to each other.

    Raises:
        UserError: replaces the error that torch.distributed raised inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_collectives(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} cannot connect to the others at {place} "
            f"({_one_line(error)}): start every rank with this MASTER_ADDR, and with a MASTER_PORT that is "
            "free on rank 0's node and open to the other nodes"
        ) from None


def destroy_process_group() -> None:
    """Destroys the process group. Without this, torch prints a warning when the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def explain_lost_rank(doing: str) -> Iterator[None]:
    """Explains the error of a failed collective.

    Args:
        doing: what the ranks are doing inside; the message begins with it.

    Raises:
        UserError: a collective inside failed. Most often another rank has ended.
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
    """Returns the error on one line: NCCL's "Last error" if there is one, else the beginning."""
    return " ".join(str(error).rpartition("Last error:")[2].split())[:240]


class Traffic:
    """Counts the bytes that this process has sent in collectives since it started, by kind.

    The counts only grow. For one step, take the difference.

    Let W be the number of ranks and n the bytes of the message. For an all-gather, n is the size of the
    gathered result; for a reduce-scatter, of the whole input. In a ring, each rank sends (Thakur et al.,
    2005, section 4):

        all-reduce                                  2n(W−1)/W
        all-gather, reduce-scatter, all-to-all       n(W−1)/W
        broadcast, point-to-point                    n

    A library with another algorithm sends as much or less.
    """

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()

    def note(self, kind: str, n_bytes: int, n_ranks: int) -> None:
        """Adds one collective of `n_ranks` ranks with a message of `n_bytes`."""
        factor = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}.get(kind)
        self.sent_bytes[kind] += n_bytes if factor is None else factor * n_bytes * (n_ranks - 1) // n_ranks


TRAFFIC = Traffic()


def _note(kind: str, *tensors: torch.Tensor) -> None:
    TRAFFIC.note(kind, sum(t.numel() * t.element_size() for t in tensors), world_size())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Returns the sum over ranks as a new tensor, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        _note("all_reduce", value)
        dist.all_reduce(value)
    return value


def all_reduce_max_int(value: int, device: torch.device) -> int:
    """Returns the largest value of all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    _note("all_reduce", tensor)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def on_any_rank(flag: torch.Tensor) -> bool:
    """Returns whether a bool scalar is true on any rank. Waits for the device."""
    if world_size() == 1:
        return bool(flag)
    found = flag.to(torch.uint8)
    _note("all_reduce", found)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def all_gather_object(value: Any) -> list[Any]:
    """Returns one small Python value of each rank, in rank order. It is pickled: not for large data."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(work: Callable[[], T]) -> T:
    """Runs `work` and returns its result. If it fails on one rank, it fails on all.

    Otherwise the other ranks would wait for the failed one.

    Raises:
        UserError: `work` raised one on some rank. Every rank raises the one of the lowest such rank.
    """
    mistake = ""
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    if mistakes := [said for said in all_gather_object(mistake) if said]:
        raise UserError(mistakes[0])
    return result


def on_first_rank(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its result on every rank. It is pickled.

    Raises:
        UserError: `work` raised it on rank 0. Every rank raises it.
    """
    outcome: tuple[Any, str] = (None, "")
    if rank() == 0:
        try:
            outcome = (work(), "")
        except UserError as error:
            outcome = (None, str(error))
    result, mistake = broadcast_object(outcome)
    if mistake:
        raise UserError(mistake)
    first: T = result
    return first


def broadcast_object(value: T) -> T:
    """Returns rank 0's Python value on every rank. It is pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_counts(value: int, device: torch.device) -> list[int]:
    """Returns one whole number of each rank, in rank order."""
    if world_size() == 1:
        return [value]
    counts = torch.empty(world_size(), 1, dtype=torch.int64, device=device)
    _note("all_gather", counts)
    dist.all_gather(list(counts), torch.tensor([value], device=device))
    return [int(count) for count in counts.flatten().tolist()]


def ring_shift(x: torch.Tensor) -> torch.Tensor:
    """Sends this rank's tensor to the next rank and returns the tensor of the previous rank.

    All ranks need the same shape. There is no gradient.
    """
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
    """Returns the rows of all ranks in rank order, `[N_all, ...]`. Ranks may hold different numbers of rows.

    It is differentiable. A rank's rows get the sum of the gradients that all ranks have for them.

    Args:
        wire_dtype: rows are rounded to this dtype before they are sent. A single rank rounds too, so the
            result does not depend on the number of ranks. Gradients are summed in the dtype of `x_ND`.
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
        # An all-gather needs equal shapes, so every rank pads its rows to the largest number.
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
        # Row i of rank r was copied to every rank. So its gradient is the sum over ranks: a reduce-scatter,
        # which also needs equal shapes.
        n_most = max(ctx.counts)
        padded = gradient.new_zeros(len(ctx.counts), n_most, *gradient.shape[1:])
        for block, rows in zip(padded, gradient.split(ctx.counts), strict=True):
            block[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        _note("reduce_scatter", padded)
        dist.reduce_scatter(own, list(padded))
        return own[: ctx.n_rows], None
