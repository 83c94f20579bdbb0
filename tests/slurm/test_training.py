"""`sbatch slurm/train_7b.sh` on two nodes: it trains, and whatever ends it, it goes on to the same losses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import write_recipe
from tests.support.slurm_cluster import Cluster, wait_for

pytestmark = pytest.mark.slow

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output)]


@pytest.fixture
def submit(cluster: Cluster, values: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    def submitted(output: Path, *overrides: str, **variables: str) -> str:
        path = write_recipe({**values, "output_dir": str(output)}, tmp_path / "recipe.yaml")
        return cluster.submit("slurm/train_7b.sh", str(path), *overrides, options=TWO_NODES, **variables)

    return submitted


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Job and folder of a run on two nodes that nothing happens to."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    path = write_recipe({**values, "output_dir": str(output)}, output.with_suffix(".yaml"))
    job = cluster.submit("slurm/train_7b.sh", str(path), options=TWO_NODES)
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    return job, output


def running_past(output: Path, step: int) -> Callable[[], bool]:
    return lambda: len(rows(output)) > step


def resumed_from(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"going on from .*?(\d+)$", log, re.MULTILINE)]


def test_two_nodes_train_as_one_process(
    cluster: Cluster, undisturbed: tuple[str, Path], values: dict[str, Any], tmp_path: Path
) -> None:
    job, output = undisturbed
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert cluster.job(job)["NumNodes"] == "2"
    path = write_recipe({**values, "output_dir": str(tmp_path / "one")}, tmp_path / "one.yaml")
    one_process = cluster.run("python", "-m", "llm2vec_ds", "train", str(path), OMP_NUM_THREADS="1")
    assert one_process.returncode == 0, one_process.stderr
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_preempted_it_is_requeued_and_ends_with_the_same_losses(
    cluster: Cluster,
    submit: Callable[..., str],
    undisturbed: tuple[str, Path],
    values: dict[str, Any],
    tmp_path: Path,
) -> None:
    """First near its time limit, as it were, then by a job of higher priority that needs all nodes."""
    output = tmp_path / "run"
    job = submit(output)
    wait_for("step 20", running_past(output, 20))
    for _ in range(2):  # a second signal changes nothing
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for("requeue", lambda: cluster.job(job).get("Restarts") == "1")
    first = len(rows(output))
    wait_for("20 more steps", running_past(output, first + 20))
    cluster.run(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    wait_for("requeue", lambda: cluster.job(job).get("Restarts") == "2")
    job_end = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    log = cluster.log(job)
    assert (job_end["JobState"], job_end["Restarts"]) == ("COMPLETED", "2"), log
    assert resumed_from(log)[0] == first
    assert first + 20 < resumed_from(log)[1] < values["max_steps"]
    assert log.count("stopped as asked, everything saved") == 2
    assert losses(output) == losses(undisturbed[1])


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, submit: Callable[..., str], undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = submit(output)
    wait_for("step 30", running_past(output, 30))
    lost = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()[1]
    cluster.lose_node(lost)
    try:
        wait_for("requeue", lambda: cluster.job(job).get("Restarts") == "1")
        job_end = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    finally:
        cluster.start_node(lost)
    log = cluster.log(job)
    assert job_end["JobState"] == "COMPLETED", log
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()
    assert lost not in nodes  # another took its place
    assert resumed_from(log)[0] >= 25
    checkpoint = output / "checkpoints" / f"step-{resumed_from(log)[0]:08d}"
    assert (
        f"node {lost} has failed: SLURM puts the job back into the queue, it goes on from {checkpoint}" in log
    )
    assert "asked to stop" not in log
    assert re.findall(r"attempt (\d) (begins|ends) 20\d\d-", log) == [
        ("0", "begins"),
        ("0", "ends"),
        ("1", "begins"),
        ("1", "ends"),
    ], log
    assert losses(output) == losses(undisturbed[1])
    cluster.wait_until_idle()


def test_a_stop_file_ends_the_chain(
    cluster: Cluster, submit: Callable[..., str], values: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = submit(output)
    wait_for("step 10", running_past(output, 10))
    (output / "STOP").touch()
    job_end = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert (job_end["ExitCode"], job_end["Restarts"]) == ("75:0", "0"), cluster.log(job)
    assert 10 < len(rows(output)) < values["max_steps"]
    last = cluster.log(job).strip().splitlines()[-1]
    assert last.startswith("train_7b: attempt 0 ends 20")
    assert f"stopped as asked by {output}/STOP, everything saved" in last


def test_an_error_is_not_requeued_and_ends_the_log_with_its_line(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit(tmp_path / "run", "batch.micro_batch_tokens=8")
    job_end = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert (job_end["JobState"], job_end["Restarts"]) == ("FAILED", "0")
    last = cluster.log(job).strip().splitlines()[-1]
    assert "training failed" in last
    assert "raise it to at least 64" in last


def test_a_finished_run_ends_at_once(
    cluster: Cluster, values: dict[str, Any], undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    path = write_recipe({**values, "output_dir": str(undisturbed[1])}, tmp_path / "recipe.yaml")
    before = (undisturbed[1] / "metrics.jsonl").read_bytes()
    job = cluster.submit("slurm/train_7b.sh", str(path), options=TWO_NODES)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert "finished already" in cluster.log(job)
    assert (undisturbed[1] / "metrics.jsonl").read_bytes() == before
