"""What goes wrong in a run ends in one line with cause and fix, and costs no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.engine.checkpoint import CheckpointStore
from llm2vec_ds.engine.watchdog import EXIT_CODE as HUNG
from llm2vec_ds.errors import Stopped
from tests.faults.attempt import attempt
from tests.faults.operations import Fault
from tests.support.runs import recipe, write_recipe

WORLD = 2


class Run:
    """A SimCSE run of six steps on two ranks, a checkpoint after each second."""

    def __init__(self, folder: Path, model: Path, texts: Path) -> None:
        self.folder, self.log = folder / "run", folder / "log"
        values = recipe("simcse", model, texts, self.folder)
        values["simcse"] = {"attention_dropout": 0.3}
        values["checkpoint"] = {"every_steps": 2, "keep_last": 3}
        self.values: dict[str, Any] = values

    def attempt(self, fault: Fault | None = None) -> list[int]:
        return attempt(write_recipe(self.values, self.folder.with_suffix(".yaml")), WORLD, self.log, fault)

    def errors(self, rank: int = 0) -> list[str]:
        """The error lines of a rank, which must have printed no traceback."""
        said = Path(f"{self.log}.{rank}").read_text()
        assert "Traceback" not in said, said
        return [line for line in said.splitlines() if line.startswith("llm2vec-ds: ")]

    def newest_step(self) -> int:
        found = CheckpointStore(self.folder / "checkpoints", keep_last=3).newest_valid()
        return found.step if found else 0

    def losses(self) -> list[float]:
        rows = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> Run:
    return Run(tmp_path, tiny_model_dir, texts_file)


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), tiny_model_dir, texts_file)
    with pytest.MonkeyPatch.context() as own:  # texts are prepared in it, as in each test
        # Not there yet, as in each test: every folder that is made counts.
        own.setenv("LLM2VEC_DS_CACHE", str(tmp_path_factory.mktemp("cache") / "new"))
        assert run.attempt() == [0, 0]
    return run


@pytest.fixture
def undisturbed(undisturbed_run: Run) -> list[float]:
    return undisturbed_run.losses()


def goes_on_to_the_same_end(run: Run, undisturbed: list[float]) -> None:
    assert run.attempt() == [0, 0]
    assert run.losses() == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_and_stops_all(rank: int, run: Run, undisturbed: list[float]) -> None:
    assert run.attempt(Fault(rank, "signal", 2)) == [Stopped.EXIT_CODE] * WORLD
    cause = "SIGUSR1" if rank == 0 else "a signal to another rank"
    assert run.errors()[-1] == (
        f"llm2vec-ds: stopped by {cause} after step 3 of 6, everything saved: run the same command with "
        "resume=true to go on"
    )
    assert run.newest_step() == 3
    goes_on_to_the_same_end(run, undisturbed)


def test_the_stop_file_keeps_a_run_from_going_on(run: Run, undisturbed: list[float]) -> None:
    run.folder.mkdir()
    (run.folder / "STOP").touch()
    assert run.attempt() == [2, 2]
    assert "STOP is there to keep this run from starting: remove it first" in run.errors()[-1]
    (run.folder / "STOP").unlink()
    goes_on_to_the_same_end(run, undisturbed)


def test_a_rank_that_dies_is_noticed_by_the_others(run: Run, undisturbed: list[float]) -> None:
    codes = run.attempt(Fault(1, "kill", "write:1"))
    assert codes == [2, -9]
    (line,) = run.errors()
    assert "the checkpoint of step 2: rank 0 has lost another rank" in line
    assert "run again with resume=true" in line
    goes_on_to_the_same_end(run, undisturbed)


def test_a_rank_that_dies_before_the_first_step_is_noticed_by_the_others(run: Run) -> None:
    assert run.attempt(Fault(1, "absent")) == [2, -9]
    (line,) = run.errors()
    assert "before or after the steps: rank 0 has lost another rank" in line
    assert "run again with resume=true" in line


def test_a_hang_ends_with_rank_and_step(run: Run, undisturbed: list[float]) -> None:
    run.values["step_timeout_s"] = 10
    codes = run.attempt(Fault(1, "hang", 3))
    assert HUNG in codes
    assert 0 not in codes
    lines = [line for rank in range(WORLD) if codes[rank] == HUNG for line in run.errors(rank)]
    assert lines
    assert all("step 4 on rank" in line and "has taken more than 10 s" in line for line in lines)
    assert list(run.folder.glob("hang-rank-*.txt"))
    assert run.newest_step() == 2
    del run.values["step_timeout_s"]
    goes_on_to_the_same_end(run, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_while_saving(rank: int, run: Run, undisturbed: list[float]) -> None:
    codes = run.attempt(Fault(rank, "full", "write:2"))
    assert codes == [2, 2]
    (line,) = run.errors()
    assert f"the checkpoint of step 4 cannot be written to {run.folder / 'checkpoints'}" in line
    assert f"(rank {rank}: No space left on device: free some space, or write to another disk)" in line
    assert "The checkpoint of step 2 is untouched" in line
    assert run.newest_step() == 2
    goes_on_to_the_same_end(run, undisturbed)


def test_not_a_number_on_one_rank_stops_all_before_the_step(run: Run) -> None:
    assert run.attempt(Fault(1, "nan", 2)) == [2, 2]
    for rank in range(WORLD):
        (line,) = run.errors(rank)
        assert "step 3: loss or gradient is not finite (rank 1, text" in line
    assert run.newest_step() == 2


def test_a_damaged_newest_checkpoint_is_passed_over(run: Run, undisturbed: list[float]) -> None:
    assert run.attempt() == [0, 0]
    (run.folder / "finished").unlink()
    newest = run.folder / "checkpoints" / "step-00000006"
    with (newest / "part-00001.safetensors").open("r+b") as part:
        part.seek(200)
        part.write(b"\xff")
    goes_on_to_the_same_end(run, undisturbed)
    said = Path(f"{run.log}.0").read_text()
    assert "part-00001.safetensors is not what was written (SHA-256 differs)" in said
    assert "going on from" in said
    assert run.newest_step() == 6
