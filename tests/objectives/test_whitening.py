"""Whitening: all directions get one variance, and directions without variance stay out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_ds.objectives.whitening import Whitening

RANDOM = np.random.default_rng(0)
VECTORS = (RANDOM.normal(size=(200, 8)) @ RANDOM.normal(size=(8, 8)) + 3).astype(np.float32)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_power_of_the_covariance(power: float) -> None:
    """The covariance C becomes C^(1 − power), whatever the blocks."""
    whitening = Whitening.of([VECTORS[:50], VECTORS[50:]], power)
    found = whitening(torch.from_numpy(VECTORS)).double().numpy()
    variances, directions = np.linalg.eigh(np.cov(VECTORS.T.astype(np.float64), bias=True))
    expected = (directions * variances ** (1 - power)) @ directions.T
    np.testing.assert_allclose(np.cov(found.T, bias=True), expected, atol=1e-5 * variances.max())
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)


def test_a_direction_without_variance_becomes_0() -> None:
    flat = VECTORS.copy()
    flat[:, 2] = 7
    whitening = Whitening.of([flat], 1.0)
    other = torch.zeros(1, 8)
    other[0, 2] = 1e6
    assert whitening(other).abs().max() < 100
    assert whitening(other)[0, 2] == pytest.approx(0, abs=1e-6)
