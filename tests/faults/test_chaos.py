"""Runs that are killed anywhere in a save, and at random moments, go on to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import chaos


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Every file operation of the second save, which also deletes the first; `make chaos` does all."""
    outcome = chaos.run(tmp_path, n_kills=30, seed=0, save=2)
    assert outcome.is_good, outcome
    assert outcome.kills >= 30
    assert outcome.points >= 20
