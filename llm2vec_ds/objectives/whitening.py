"""Whitening: gives the principal directions of vectors more equal weight.

Shape legend: N vectors, D their width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

LEAST_VARIANCE = 1e-10
"""A direction with less than this share of the largest variance is rounding. It becomes 0."""


class Whitening:
    """x → (x − mean) · U · diag(σ^−power) · Uᵀ.

    U holds the principal directions, and σ their standard deviations. With power 1 all directions have the
    same variance (Su et al., 2021, arXiv 2103.15316, equation 5). With power 0 it only centres. The last
    factor turns the result back. So it does not depend on the signs of the directions, which may differ from
    machine to machine.
    """

    def __init__(self, mean_D: torch.Tensor, matrix_DD: torch.Tensor) -> None:
        self.mean_D, self.matrix_DD = mean_D, matrix_DD

    @classmethod
    def of(cls, blocks_ND: Iterable[np.ndarray], power: float) -> Whitening:
        """Learns it from vectors, in fp64. The blocks need not fit in memory together."""
        n, total_D, products_DD = 0, np.zeros(1), np.zeros((1, 1))
        for block_ND in blocks_ND:
            wide_ND = block_ND.astype(np.float64)
            n += len(wide_ND)
            total_D = total_D + wide_ND.sum(0)
            products_DD = products_DD + wide_ND.T @ wide_ND
        mean_D = total_D / n
        variance_D, direction_DD = np.linalg.eigh(products_DD / n - np.outer(mean_D, mean_D))
        varies_D = variance_D > LEAST_VARIANCE * variance_D[-1]
        scale_D = np.where(varies_D, np.where(varies_D, variance_D, 1.0) ** (-power / 2), 0.0)
        return cls(torch.from_numpy(mean_D), torch.from_numpy((direction_DD * scale_D) @ direction_DD.T))

    def __call__(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Returns `[N, D]` fp32."""
        return ((vectors_ND.double() - self.mean_D) @ self.matrix_DD).float()
