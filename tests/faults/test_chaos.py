"""Runs that are killed anywhere in a save, and at random moments, go on to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import chaos, chaos_export


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Every file operation of the second save, which also deletes the first; `make chaos` does all."""
    outcome = chaos.run(tmp_path, n_kills=30, seed=0, phases=["2"])
    assert outcome.is_good, outcome
    assert outcome.kills >= 30
    assert outcome.points >= 20


@pytest.mark.slow
def test_kills_lose_no_encoder(tmp_path: Path) -> None:
    """Some file operations from the writing of `encoder/` to the end of the run; `make chaos` does all."""
    outcome = chaos.run(tmp_path, n_kills=1, seed=1, phases=["encoder"], every=4)
    assert outcome.is_good, outcome
    assert outcome.points >= 5


@pytest.mark.slow
def test_kills_lose_no_export(tmp_path: Path) -> None:
    """Some file operations; `make chaos` does all."""
    outcome = chaos_export.run(tmp_path / "exports", every=12)
    assert outcome.is_good, outcome
    assert outcome.kills >= 4
