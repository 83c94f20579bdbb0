"""Ranks from the environment, and collectives with gradients."""

from __future__ import annotations

import pytest
import torch

from llm2vec_ds.distributed import Ranks, export_ranks, gather_rows, ranks_from_environment
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
