"""A real SLURM on this host: munged, slurmctld and a slurmd for each node, in a folder of its own.

Nothing of the system's own configuration is read or changed: SLURM_CONF and munge's socket name ours. The
nodes are processes of one host, so what needs several hosts (NCCL, a shared file system that is slow, a
network that fails) is not seen here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CRED_EXPIRE_S = 5
"""A requeued job waits that long (SLURM's default is 120 s)."""
SLURMD_TIMEOUT_S = 10
"""A node that has not answered for so long is down."""
GRACE_TIME_S = 30
"""What a job in partition `test` gets to end when one in `urgent` wants its nodes."""

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={cred_expire_s}
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout_s}
KillWait=10
WaitTime=0
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
TaskProlog={folder}/task_prolog
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_time_s}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""

TASK_PROLOG = """#!/bin/sh
# Plants a fault: jobs submitted with BAD_NODE and BAD_EXPORT=NAME=value have that variable on that node.
[ "$SLURMD_NODENAME" != "$BAD_NODE" ] || echo "export $BAD_EXPORT"
"""


def missing_daemons() -> list[str]:
    return [name for name in DAEMONS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """PATH with the folders of daemons, which a plain user's often lacks."""
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def wait_for(what: str, true: Callable[[], object], timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"no {what} within {timeout_s} s"
        time.sleep(0.2)


class Cluster:
    """Four nodes of eight GPUs (counts without devices) and 64 CPUs, as the shipped scripts ask for."""

    def __init__(self, folder: Path, nodes: tuple[str, ...] = ("n1", "n2", "n3", "n4")) -> None:
        self.folder, self.nodes = folder, nodes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Not that of a job in which the tests themselves may run.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = {
            **inherited,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), search_path()]),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LLM2VEC_DS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        for number in range(8):  # SLURM counts GPUs by their device files, and looks no further
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "task_prolog").write_text(TASK_PROLOG)
        (self.folder / "task_prolog").chmod(0o755)
        control_port, *ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 "
            "RealMemory=4000 Gres=gpu:8"
            for name, port in zip(self.nodes, ports, strict=True)
        )
        text = CONFIG.format(
            folder=self.folder,
            port=control_port,
            cred_expire_s=CRED_EXPIRE_S,
            slurmd_timeout_s=SLURMD_TIMEOUT_S,
            grace_time_s=GRACE_TIME_S,
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(text)
        self._start_munge()
        self._spawn("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        self.wait_until_idle()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        paths = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={folder / name}" for option, name in paths.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *options)
        wait_for("munge socket", (folder / "socket").exists)

    def _spawn(self, name: str, *line: str) -> None:
        # A session of its own, so that Ctrl-C leaves the order of stopping to `stop`.
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                line, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self._spawn(name, "slurmd", "-D", "-N", name)

    def wait_until_idle(self) -> None:
        wait_for("idle nodes", lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"])

    def lose_node(self, name: str) -> None:
        """As if its power failed: slurmd, the job steps on it and their processes end at once."""
        self._daemons.pop(name).kill()
        tasks = self._processes(f"SLURMD_NODENAME={name}")
        parents = {_name_and_parent(pid)[1] for pid in tasks}
        _kill(tasks | {pid for pid in parents if _name_and_parent(pid)[0] == "slurmstepd"})

    def _processes(self, variable: str) -> set[int]:
        """Of this cluster's jobs, those with `NAME=value` in their environment."""
        wanted = {variable.encode(), f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()}
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = set(path.read_bytes().split(b"\0"))
            except OSError:  # ended meanwhile
                continue
            if wanted <= variables:
                found.add(int(path.parent.name))
        return found

    def run(self, *line: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line,
            capture_output=True,
            text=True,
            env={**self.environment, **variables},
            cwd=cwd,
            timeout=300,
            check=False,
        )

    def submit(
        self,
        script: str,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path = ROOT,
        **variables: str,
    ) -> str:
        """`sbatch OPTIONS SCRIPT ARGUMENTS` from the repository, with this Python; the job's number."""
        line = ["sbatch", "--parsable", f"--output={self.folder}/%x-%j.out", *options, script, *arguments]
        outcome = self.run(*line, cwd=cwd, **variables)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 300) -> dict[str, str]:
        try:
            wait_for(" or ".join(states), lambda: self.job(job_id).get("JobState") in states, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.job(job_id)}\n{self.log(job_id)}") from None
        return self.job(job_id)

    def log(self, job_id: str) -> str:
        path = Path(self.job(job_id).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else f"(no log {path})"

    def stop(self) -> None:
        self.run("scancel", "--state=PENDING")
        for name in [*self.nodes, "slurmctld", "munged"]:
            if daemon := self._daemons.pop(name, None):
                daemon.terminate()
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
        # What is left of jobs, and the steps' own daemons.
        _kill(self._processes(f"SLURM_CONF={self.folder / 'slurm.conf'}"))


def _name_and_parent(pid: int) -> tuple[str, int]:
    """Of a process; ("", 0) if it has ended."""
    try:
        name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
    except OSError:
        return "", 0
    return name, int(rest.split()[1])


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
