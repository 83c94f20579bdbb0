"""Detects that all texts of the global batch have the same vector: the encoder has collapsed."""

from __future__ import annotations

import torch

ALIKE = 1e-6
"""Vectors whose 1 − cosine is below this differ by rounding only."""


def spread(vectors: torch.Tensor, n_distinct: int) -> torch.Tensor:
    """Returns `[2]` fp32: 1 if this rank's texts differ (else 0), and how far apart their vectors are.

    The caller sums both over ranks.

    Args:
        vectors: vectors of this rank's texts, `[N, D]`.
        n_distinct: number of distinct texts.
    """
    can_differ = torch.tensor(float(n_distinct > 1), device=vectors.device)
    return torch.stack([can_differ, can_differ * distance_from_first(vectors)])


def are_alike(n_can_differ: float, distance: float) -> bool:
    """Returns whether all vectors are alike although texts differ, from the sums of `spread` over ranks."""
    return n_can_differ > 0 and distance < ALIKE


def distance_from_first(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the largest 1 − cosine between the first of `vectors [N, D]` and the rest, a scalar in fp32."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return (unit - unit[0]).square().sum(-1).max() / 2
