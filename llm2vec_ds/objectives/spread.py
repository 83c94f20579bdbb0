"""Whether all texts of the global batch have one vector: what an encoder that learns nothing ends with."""

from __future__ import annotations

import torch

ALIKE = 1e-6
"""1 − cosine of vectors that differ by rounding only."""


def spread(vectors: torch.Tensor, n_distinct: int) -> torch.Tensor:
    """`[2]` fp32, to be summed over ranks: whether this rank's texts differ, and how far their vectors do.

    Args:
        vectors: of this rank's texts, `[N, D]`.
        n_distinct: how many of the texts differ.
    """
    can_differ = torch.tensor(float(n_distinct > 1), device=vectors.device)
    return torch.stack([can_differ, can_differ * distance_from_first(vectors)])


def are_alike(n_can_differ: float, distance: float) -> bool:
    """From the sums of `spread`."""
    return n_can_differ > 0 and distance < ALIKE


def distance_from_first(vectors: torch.Tensor) -> torch.Tensor:
    """Largest 1 − cosine between the first of `vectors [N, D]` and another, a scalar in fp32."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return (unit - unit[0]).square().sum(-1).max() / 2
