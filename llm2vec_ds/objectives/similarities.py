"""A loss that pulls a student's cosines between texts towards a teacher's.

Shape legend: Q rows, N columns, D the student's width, T the teacher's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

Kind = Literal["kl", "mse"]

ROWS_PER_BLOCK = 1024
"""The cosines of this many rows are held at once. Backward computes them again."""


class TaughtVectors(NamedTuple):
    """Student's and teacher's vectors of the same texts, all of length 1, and the texts' ids.

    Attributes:
        student_ND, teacher_NT: `[N, D]` and `[N, T]`.
        id_N: int64.
    """

    student_ND: torch.Tensor
    teacher_NT: torch.Tensor
    id_N: torch.Tensor


def similarity_loss(
    rows: TaughtVectors, columns: TaughtVectors, kind: Kind, temperature: float
) -> torch.Tensor:
    """Returns one loss for each row, `[Q]` fp32: of its cosines with all columns that have another id.

    Args:
        kind: `kl`, KL(softmax(teacher / τ) ‖ softmax(student / τ)) (cf. Fang et al., 2021, arXiv 2101.04731),
            or `mse`, the mean squared difference (cf. Tung and Mori, 2019, arXiv 1907.09682).
        temperature: τ.
    """
    blocks = zip(*(x.split(ROWS_PER_BLOCK) for x in rows), strict=True)
    losses = [
        checkpoint(_of_block, TaughtVectors(*block), columns, kind, temperature, use_reentrant=False)
        for block in blocks
    ]
    return torch.cat(losses)


def _of_block(rows: TaughtVectors, columns: TaughtVectors, kind: Kind, temperature: float) -> torch.Tensor:
    student_QN, teacher_QN = rows.student_ND @ columns.student_ND.T, rows.teacher_NT @ columns.teacher_NT.T
    is_own = rows.id_N[:, None] == columns.id_N
    if kind == "mse":
        difference = (student_QN - teacher_QN).masked_fill(is_own, 0.0)
        return difference.square().sum(-1) / (~is_own).sum(-1)
    wanted, found = (
        (cosines / temperature).masked_fill(is_own, -torch.inf).log_softmax(-1)
        for cosines in (teacher_QN, student_QN)
    )
    return (wanted.exp() * (wanted - found).masked_fill(is_own, 0.0)).sum(-1)
