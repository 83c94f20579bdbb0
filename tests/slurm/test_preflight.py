"""`slurm/preflight.sh` lets fit nodes pass and names those that are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.slow

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--nodelist=n1,n2")


def test_nodes_and_what_is_wrong_with_them(cluster: Cluster, tmp_path: Path) -> None:
    """Faults planted on n2, a job each; all at once, to save time."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 30\n"
    )
    path = f"{tmp_path}:{cluster.environment.get('PYTHONPATH', '')}"
    faults = {
        "none": ("UNUSED=1", "every node is fit: n[1-2]"),
        "disk": (
            "LLM2VEC_DS_CACHE=/proc/nowhere",
            "n2: disk: LLM2VEC_DS_CACHE=/proc/nowhere cannot be written",
        ),
        "clock": (f"PYTHONPATH={path}", "n2: clock: +"),
        "network": ("GLOO_SOCKET_IFNAME=nowhere0", "n2: all-reduce: "),
        "absent": ("PYTHONHOME=/nowhere", "n2: meeting: rank 1 does not answer"),
        "GPU": ("UNUSED=1", "n1: GPU: none that torch sees"),
    }
    jobs = {}
    for name, (fault, _) in faults.items():
        arguments = [str(tmp_path / "runs"), *([] if name == "GPU" else ["--cpu"])]
        jobs[name] = cluster.submit(
            "slurm/preflight.sh",
            *arguments,
            options=OPTIONS,
            BAD_NODE="n2",
            BAD_EXPORT=fault,
            LLM2VEC_DS_MIN_FREE_GIB="0.1",
            LLM2VEC_DS_NODE_TIMEOUT_S="30",
        )
    for name, (_, said) in faults.items():
        state = cluster.wait_for_state(jobs[name], "COMPLETED", "FAILED")["JobState"]
        log = cluster.log(jobs[name])
        assert state == ("COMPLETED" if name == "none" else "FAILED"), f"{name}: {log}"
        assert said in log, f"{name}: {log}"
        if name == "clock":  # read when all ranks are there, but not at the same instant
            skew_s = float(re.search(r"clock: \+([\d.]+) s from the first node's", log)[1])  # type: ignore[index]
            assert skew_s == pytest.approx(30, abs=1)
        if name in ("disk", "clock", "absent"):
            assert "error: n1:" not in log, f"{name}: {log}"
            assert "preflight: error: n2 is not fit: submit with --exclude=n2" in log, f"{name}: {log}"
        if name == "GPU":
            assert (
                "every node has the same error, so a setting or a shared disk is at fault"
                in log.splitlines()[-1]
            ), log


def test_a_setting_is_not_blamed_on_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """A wrong interface, a Python that is not there. LLM2VEC_DS_PREFLIGHT=cpu holds here too."""
    settings = {
        "LLM2VEC_DS_INTERFACE": (
            "ib9",
            "rank 0 has no address: llm2vec-ds: error: no network interface 'ib9'",
        ),
        "LLM2VEC_DS_PYTHON": ("/nosuch/python", "/nosuch/python cannot run llm2vec-ds ("),
        "LLM2VEC_DS_CACHE": (
            "/proc/nosuch",
            "every node has the same error, so a setting or a shared disk is at fault",
        ),
    }
    jobs = {
        name: cluster.submit(
            "slurm/preflight.sh",
            str(tmp_path / "runs"),
            options=OPTIONS,
            LLM2VEC_DS_PREFLIGHT="cpu",
            LLM2VEC_DS_MIN_FREE_GIB="0.1",
            **{name: value},
        )
        for name, (value, _) in settings.items()
    }
    for name, (_, said) in settings.items():
        assert cluster.wait_for_state(jobs[name], "COMPLETED", "FAILED")["JobState"] == "FAILED"
        log = cluster.log(jobs[name])
        assert said in log.splitlines()[-1], f"{name}: {log}"
        assert "GPU" not in log, log


def test_a_node_on_which_nothing_starts(cluster: Cluster, tmp_path: Path) -> None:
    cluster.lose_node("n2")
    try:
        job = cluster.submit("slurm/preflight.sh", "--cpu", str(tmp_path), options=OPTIONS)
        assert cluster.wait_for_state(job, "FAILED", "NODE_FAIL", "COMPLETED")["JobState"] == "FAILED"
        assert "no command starts on n2: submit with --exclude=n2" in cluster.log(job)
    finally:
        cluster.start_node("n2")
        cluster.wait_until_idle()
