"""The loss equals an independent computation in double precision, gradients too, on any number of ranks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from llm2vec_ds.distributed import all_reduce_sum
from llm2vec_ds.objectives.distillation.loss import DistillationLoss
from llm2vec_ds.recipe.objectives import DistilConfig
from tests.support.ranks import run_ranks

KINDS = [
    {"vector_weight": 1.0, "similarity_loss": "kl", "temperature": 0.2},
    {"vector_loss": "mse", "similarity_loss": "mse", "vector_weight": 0.3, "similarity_weight": 2.0},
    {"vector_weight": 0.0, "similarity_loss": "kl"},
    {"vector_weight": 1.5, "similarity_weight": 0.0},
]
TEXTS, WIDTH, TEACHER_WIDTH = 11, 6, 4


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((TEXTS, WIDTH), (TEXTS, TEACHER_WIDTH), (TEXTS, TEACHER_WIDTH))
    student, mapped, teacher = (torch.randn(shape, generator=generator) for shape in shapes)
    teacher[4] = teacher[2]  # a text that stands in the batch twice
    return student, mapped, teacher


def expected(
    student: torch.Tensor, mapped: torch.Tensor, teacher: torch.Tensor, config: DistilConfig
) -> torch.Tensor:
    """Text by text and pair by pair, by the formulas of the docstring."""

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b / (a @ a).sqrt() / (b @ b).sqrt()

    total = student.new_zeros(())
    for i in range(TEXTS):
        if config.vector_loss == "cosine":
            vector = 1 - cosine(mapped[i], teacher[i])
        else:
            vector = (mapped[i] - teacher[i]).square().mean()
        others = [j for j in range(TEXTS) if j != i]
        found = torch.stack([cosine(student[i], student[j]) for j in others])
        wanted = torch.stack([cosine(teacher[i], teacher[j]) for j in others])
        if config.similarity_loss == "mse":
            similarity = (found - wanted).square().mean()
        else:
            p = (wanted / config.temperature).exp()
            q = (found / config.temperature).exp()
            p, q = p / p.sum(), q / q.sum()
            similarity = (p * (p / q).log()).sum()
        total = total + config.vector_weight * vector + config.similarity_weight * similarity
    return total / TEXTS


@pytest.mark.parametrize("rows_per_block", [1024, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_in_double_precision(
    kind: dict[str, object], rows_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec_ds.objectives.similarities.ROWS_PER_BLOCK", rows_per_block)
    config = DistilConfig(teacher="t", **kind)  # type: ignore[arg-type]
    student, mapped, teacher = vectors()
    leaves = [x.clone().requires_grad_() for x in (student, mapped)]
    loss = DistillationLoss(config)
    value = loss.weighted(*loss(leaves[0], leaves[1], teacher, torch.tensor(float(TEXTS))))
    found = torch.autograd.grad(value, leaves, materialize_grads=True)
    double = [x.double().requires_grad_() for x in (student, mapped)]
    reference = expected(double[0], double[1], teacher.double(), config)
    wanted = torch.autograd.grad(reference, double, materialize_grads=True)
    assert value.item() == pytest.approx(reference.item(), rel=2e-6)
    assert math.isfinite(value.item())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def _on_ranks(rank: int, world: int, kind: dict[str, object]) -> list[torch.Tensor]:
    """Ranks have different numbers of texts."""
    start, stop = (0, 3) if rank == 0 else (3, TEXTS)
    student, mapped, teacher = (x[start:stop] for x in vectors())
    leaves = [x.clone().requires_grad_() for x in (student, mapped)]
    loss = DistillationLoss(DistilConfig(teacher="t", **kind))  # type: ignore[arg-type]
    share = loss.weighted(*loss(leaves[0], leaves[1], teacher, torch.tensor(float(TEXTS))))
    return [all_reduce_sum(share), *torch.autograd.grad(share, leaves, materialize_grads=True)]


def test_shares_of_ranks_add_up() -> None:
    student, mapped, teacher = vectors()
    leaves = [x.clone().requires_grad_() for x in (student, mapped)]
    loss = DistillationLoss(DistilConfig(teacher="t", **KINDS[0]))  # type: ignore[arg-type]
    value = loss.weighted(*loss(leaves[0], leaves[1], teacher, torch.tensor(float(TEXTS))))
    whole = torch.autograd.grad(value, leaves)
    outcomes = run_ranks(partial(_on_ranks, kind=KINDS[0]), 2)
    for total, *_ in outcomes:
        torch.testing.assert_close(total, value.detach(), rtol=1e-6, atol=0)
    for place, gradient in enumerate(whole, 1):
        parts = torch.cat([outcome[place] for outcome in outcomes])
        torch.testing.assert_close(parts, gradient, rtol=1e-5, atol=1e-7)
