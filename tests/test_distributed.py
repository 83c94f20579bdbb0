"""Ranks from the environment, and collectives with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from llm2vec_ds import distributed
from llm2vec_ds.distributed import (
    Ranks,
    agreed,
    explain_failed_rendezvous,
    explain_lost_rank,
    export_ranks,
    gather_rows,
    on_first_rank,
    ranks_from_environment,
)
from llm2vec_ds.errors import UserError
from tests.support.ranks import run_ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Ranks(3, 4, 1)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
            Ranks(5, 8, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0)),
    ],
    ids=["plain", "launcher", "srun", "inside sbatch but not srun"],
)
def test_ranks(environment: dict[str, str], expected: Ranks) -> None:
    assert ranks_from_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 is not below the world size 2"),
    ],
)
def test_contradicting_ranks_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranks_from_environment(environment)


def test_several_ranks_need_an_address() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        export_ranks(Ranks(0, 2, 0), {})
    environment: dict[str, str] = {}
    export_ranks(Ranks(), environment)
    assert environment == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _gathered(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.full((rank + 1, 2), float(rank)).requires_grad_()
    rows = gather_rows(own)
    (rows * torch.arange(1.0, len(rows) + 1)[:, None] * (rank + 1)).sum().backward()
    assert own.grad is not None
    return rows.detach(), own.grad


def test_gather_rows_of_unequal_ranks_with_the_gradient_of_all() -> None:
    results = run_ranks(_gathered, 3)
    for rows, _ in results:
        assert rows[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    # Row n is weighted n by rank 0, 2n by rank 1 and 3n by rank 2.
    assert torch.cat([gradient for _, gradient in results])[:, 0].tolist() == [6, 12, 18, 24, 30, 36]


def _said(run: Callable[[Callable[[], str]], str], rank: int, wrong: int) -> str:
    """Runs work that fails on the rank `wrong`. Returns its result, or the mistake."""

    def work() -> str:
        if rank == wrong:
            raise UserError(f"rank {rank} has no file")
        return f"of rank {rank}"

    try:
        return run(work)
    except UserError as error:
        return str(error)


def _shared(rank: int, world: int) -> list[str]:
    return [_said(run, rank, wrong) for run in (on_first_rank, agreed) for wrong in range(-1, world)]


def test_work_of_one_rank_and_of_all_fails_on_all() -> None:
    one, other = run_ranks(_shared, 2)
    first, failed, alone = "of rank 0", "rank 0 has no file", "rank 1 has no file"
    assert one == [first, failed, first, first, failed, alone]
    assert other == [first, failed, first, "of rank 1", failed, alone]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"),
            "step 3: rank 0 has lost another rank ([../gloo/transport/tcp/pair.cc:553] Connection closed by ",
        ),
        (
            dist.DistBackendError("NCCL error in: a.cpp:1, unhandled cuda error\nLast error:\nDuplicate GPU"),
            "step 3: a collective has failed (Duplicate GPU). The first error line above",
        ),
    ],
)
def test_a_failed_collective_in_words(
    error: RuntimeError, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's as its sources word it; gloo's are seen in tests/faults."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError) as raised, explain_lost_rank("step 3"):
        raise error
    assert str(raised.value).startswith(expected)


def test_a_peer_that_dies_while_ranks_meet_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "20000")
    with (
        pytest.raises(UserError, match=r"rank 1 of 2 cannot connect to the others at n1:20000 \(gloo: cl"),
        explain_failed_rendezvous(Ranks(1, 2, 1)),
    ):
        raise RuntimeError("gloo: closed")


@pytest.mark.parametrize("context", [explain_lost_rank("step 3"), explain_failed_rendezvous(Ranks(1, 2, 1))])
def test_other_errors_keep_their_traceback(context: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="^a shape$"), context:  # type: ignore[attr-defined]
        raise RuntimeError("a shape")
