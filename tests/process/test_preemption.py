"""What a run that was asked to stop says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_ds.process.preemption import StopRequest


def test_how_to_go_on_depends_on_who_runs_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of a SLURM job adds resume=true by itself."""
    monkeypatch.delenv("STOPPED_NOTE", raising=False)
    said = str(StopRequest(tmp_path).stopped("after step 3"))
    assert said.endswith("after step 3: run the same command with resume=true to go on")
    monkeypatch.setenv("STOPPED_NOTE", str(tmp_path / "note"))
    said = str(StopRequest(tmp_path).stopped("after step 3"))
    assert said.endswith("the job goes on from here when SLURM runs it again, or when you submit it again")
