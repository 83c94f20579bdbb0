"""What `slurm/train_7b.sh` makes of signals, exit codes and lost nodes; a stand-in trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.slurm_cluster import ROOT, Cluster, search_path, wait_for

pytestmark = pytest.mark.slow

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")


class Case(NamedTuple):
    mode: str
    line: tuple[str, ...]
    """Done to the job once it runs."""
    state: str
    restarts: str
    last: str
    """In the last line of the log."""
    options: tuple[str, ...] = ()
    most_restarts: str = "100"


TERM, USR1 = ("scancel", "--batch", "--signal=TERM"), ("scancel", "--batch", "--signal=USR1")
CASES = {
    "finishes": Case("finishes", (), "COMPLETED", "0", "finished: "),
    "TERM": Case("saves", TERM, "COMPLETED", "1", "finished: "),
    "asked while starting": Case("starts", USR1, "COMPLETED", "1", "finished: "),
    "asked while importing": Case("imports", USR1, "COMPLETED", "1", "finished: "),
    "TERM to the ranks": Case("saves", ("scancel", "--signal=TERM"), "COMPLETED", "1", "finished: "),
    "no restart left": Case("saves", USR1, "FAILED", "0", "0 restarts are the limit", most_restarts="0"),
    "no requeue": Case("saves", USR1, "FAILED", "0", "SLURM refuses to requeue", options=("--no-requeue",)),
    "cancelled": Case("saves", ("scancel",), "CANCELLED", "0", "submit it again"),
    "error": Case("error", (), "FAILED", "0", "(code 2): llm2vec-ds: error: the disk is full"),
    "crash": Case("crash", (), "FAILED", "0", "task 1: Segmentation fault"),
}


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    def submitted(name: str, mode: str, *options: str, **variables: str) -> str:
        return cluster.submit(
            "slurm/train_7b.sh",
            "recipes/smoke_mntp.yaml",
            options=(*OPTIONS, *options),
            LLM2VEC_DS_PYTHON=str(ROOT / "tests" / "support" / "slurm_stand_in.py"),
            STAND_IN=mode,
            STAND_IN_FOLDER=str(tmp_path / name),
            **variables,
        )

    return submitted


def test_signals_and_exit_codes(cluster: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """All at once: they mostly wait."""
    jobs = {
        name: submit(name, case.mode, *case.options, LLM2VEC_DS_MAX_REQUEUES=case.most_restarts)
        for name, case in CASES.items()
    }
    for name, job in jobs.items():
        if line := CASES[name].line:
            wait_for(
                f"{name} to run", lambda n=name: all((tmp_path / n / f"started-{r}").exists() for r in (0, 1))
            )
            cluster.run(*line, job)
    for name, job in jobs.items():
        case = CASES[name]
        ended = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
        log = cluster.log(job)
        assert (ended["JobState"], ended["Restarts"]) == (case.state, case.restarts), f"{name}: {log}"
        assert case.last in [line for line in log.splitlines() if line.startswith("train_7b")][-1], (
            f"{name}: {log}"
        )
    assert cluster.job(jobs["error"])["ExitCode"] == "2:0"


def test_the_node_of_the_batch_shell_dies(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("run", "imports", "--nodelist=n1,n2")
    wait_for("the job to run", (tmp_path / "run" / "started-1").exists)
    cluster.lose_node("n1")
    try:
        wait_for("requeue", lambda: cluster.job(job).get("Restarts") == "1")
    finally:
        cluster.start_node("n1")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", cluster.log(job)
    cluster.wait_until_idle()


def test_preempted_while_python_starts(cluster: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """SLURM sends TERM to the ranks, not to the batch shell."""
    job = submit("run", "starts")
    wait_for("the job to run", lambda: all((tmp_path / "run" / f"started-{r}").exists() for r in (0, 1)))
    cluster.run(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "asked to stop before training began: back into the queue" in log


YOUNG_SRUN = """#!/usr/bin/env bash
case "$*" in *rank.py*) ;; *) exec {srun} "$@" ;; esac
[ -z "${{SLURM_RESTART_COUNT:-}}" ] || exit 0
{trap}
touch {folder}/started
for _ in {{1..300}}; do sleep 0.1; done
exit 3
"""


@pytest.mark.parametrize(
    "trap",
    ["", "trap 'echo srun: Cancelled pending job step with signal 10 >&2; exit 1' USR1"],
    ids=["before its handlers", "before the step"],
)
def test_a_signal_that_ends_srun(
    trap: str, cluster: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    """In its place one that is young for long, and says what srun 22.05.8 was seen to say."""
    real = shutil.which("srun", path=search_path())
    (tmp_path / "srun").write_text(YOUNG_SRUN.format(srun=real, trap=trap, folder=tmp_path))
    (tmp_path / "srun").chmod(0o755)
    job = submit("run", "saves", PATH=f"{tmp_path}:{cluster.environment['PATH']}")
    wait_for("the job to run", (tmp_path / "started").exists)
    cluster.run(*USR1, job)
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "asked to stop before training began: back into the queue" in log
