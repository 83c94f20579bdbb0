"""The scripts of `slurm/` without a cluster: syntax, help, mistakes, and that their options are sound."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
COMMANDS = [script for script in SCRIPTS if os.access(script, os.X_OK)]


def run(*line: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    return subprocess.run(
        ["bash", *line],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, **variables},
        check=False,
    )


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "slurm" / "site.env"], ids=lambda path: path.name)
def test_shell_syntax(script: Path) -> None:
    assert run("-n", str(script)).returncode == 0
    if shutil.which("shellcheck"):
        outcome = subprocess.run(
            ["shellcheck", "-x", "--shell=bash", str(script)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stdout


def test_prepare_reads_the_model_of_a_recipe() -> None:
    def model_of(recipe: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "slurm/recipe_model.py", recipe, "model.path=my/llm"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    outcome = model_of("recipes/smoke_mntp.yaml")
    assert outcome.stdout == "my/llm\n", outcome.stderr
    outcome = model_of("none.yaml")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("llm2vec-ds: error: recipe none.yaml cannot be read")
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("output_dir: runs/a_b", "runs/a_b"),
        ("output_dir: runs/a  # where it goes", "runs/a"),
        ('output_dir: "runs/my run"   # where it goes', "runs/my run"),
        ("output_dir: 'runs/#1'", "runs/#1"),
        ("seed: 1", ""),
    ],
)
def test_the_pipeline_reads_the_folder_of_a_recipe(line: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"stage: simcse\n{line}\nmax_steps: 2\n")
    script = (ROOT / "slurm" / "pipeline_7b.sh").read_text()
    function = script[script.index("output_dir_of()") : script.index("main() {")]
    outcome = run("-c", f"{function}\noutput_dir_of {tmp_path}/r.yaml")
    assert outcome.stdout.removesuffix("\n") == folder, outcome.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help(script: Path) -> None:
    outcome = run(str(script), "--help")
    assert outcome.returncode == 0
    assert f"slurm/{script.name}" in outcome.stdout


@pytest.mark.parametrize(
    ("line", "variables", "said"),
    [
        (["train_7b.sh"], {}, "submit it: sbatch slurm/train_7b.sh"),
        (["train_7b.sh", "no.yaml"], {"SLURM_JOB_ID": "1"}, "recipe no.yaml not found"),
        (["train_7b.sh", "--nodes=1"], {"SLURM_JOB_ID": "1"}, "sbatch's options before the script's name"),
        (["train_7b.sh", "recipes/smoke_mntp.yaml", "--nodes=1"], {"SLURM_JOB_ID": "1"}, "option --nodes=1"),
        (["prepare.sh", "recipes/smoke_mntp.yaml", "--nodes=1"], {}, "sbatch's options before"),
        (["evaluate.sh", "--nodes=1", "model", "results"], {}, "sbatch's options before"),
        (["encode.sh", "--array=0-7", "model", "in.txt", "out"], {}, "sbatch's options before"),
        (["encode.sh", "model"], {}, "MODEL, INPUT and OUTPUT are needed"),
        (["encode.sh", "model", "in.txt", "out"], {"SLURM_JOB_ID": "1"}, "--array=0-7"),
        (
            ["encode.sh", "model", "in.txt", "out"],
            {
                "SLURM_JOB_ID": "1",
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "5",
            },
            "give the whole array again",
        ),
        (["prepare.sh", "max_steps=1"], {}, "no recipe"),
        (["evaluate.sh", "model"], {}, "what to measure"),
        (["preflight.sh", "--gpu"], {}, "unknown option --gpu"),
        (["pipeline_7b.sh", "recipes/"], {}, "no recipes/mntp.yaml"),
        (["pipeline_7b.sh", "output_dir=x"], {}, "all three stages"),
        (["pipeline_7b.sh", "-N2"], {}, "--name=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(line: list[str], variables: dict[str, str], said: str) -> None:
    outcome = run(f"slurm/{line[0]}", *line[1:], **variables)
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
    assert said in outcome.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_submitted_from_elsewhere_it_says_so(script: Path, tmp_path: Path) -> None:
    outcome = run(str(script), cwd=tmp_path, SLURM_JOB_ID="1")
    assert outcome.returncode == 2
    assert "submit from the folder that holds slurm/" in outcome.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_a_folder_that_the_node_lacks_is_named(script: Path, tmp_path: Path) -> None:
    """SLURM then starts the script in /tmp."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho '   WorkDir=/shared/not-here'\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    outcome = run(str(script), cwd=tmp_path, **job)
    assert outcome.returncode == 2
    assert "the job's folder /shared/not-here is not on node n1: submit from a folder" in outcome.stderr
    outcome = run(str(script), cwd=tmp_path, **job, LLM2VEC_DS_ROOT="/shared/other")
    assert "no /shared/other/slurm/common.sh on node n1: LLM2VEC_DS_ROOT must name" in outcome.stderr


def test_scripts_find_the_shared_functions_in_the_same_way() -> None:
    ends = {script.read_text().partition("# SLURM runs a copy")[2] for script in COMMANDS}
    assert len(ends) == 1
    assert ends != {""}


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "llm2vec-ds: error: rank 0 has lost another rank\nllm2vec-ds: error: no interface ib9\n"
            "srun: error: n1: task 0: Exited with exit code 2\n",
            "llm2vec-ds: error: no interface ib9",
        ),
        (
            "slurmstepd: error: execve(): /nosuch/python: No such file or directory\n"
            "srun: error: n1: task 0: Exited with exit code 2\n",
            "/my/python cannot run llm2vec-ds (/nosuch/python: No such file or directory): activate its",
        ),
        (
            "ModuleNotFoundError: No module named 'pydantic'\nsrun: error: n1: task 0: Exited\n",
            "/my/python cannot run llm2vec-ds (No module named 'pydantic'): activate its environment",
        ),
        ("srun: error: n1: task 0: Segmentation fault\n", "srun: error: n1: task 0: Segmentation fault"),
        ("nothing\n", "see "),
    ],
    ids=["the program", "no Python", "no package", "srun", "unknown"],
)
def test_the_cause_of_a_failed_step(log: str, said: str, tmp_path: Path) -> None:
    """Whatever stands before the step in the log does not count."""
    (tmp_path / "log").write_text("llm2vec-ds: error: of an earlier attempt\n" + log)
    shell = "source slurm/common.sh; log=$1 log_lines_before=1 python=/my/python; last_error"
    outcome = run("-euo", "pipefail", "-c", shell, "bash", str(tmp_path / "log"))
    assert len(outcome.stdout.splitlines()) == 1, outcome
    assert outcome.stdout.startswith(said), outcome


LOST_NODE = """
source <(sed '$d' slurm/train_7b.sh) # without its last line, which runs it
cd "$1" && log=log log_lines_before=0 began=1 code=1 output_dir=run STOPPED_NOTE=none SLURM_JOB_ID=7
touch log
scontrol() { echo Restarts=1; }
trap ask_to_stop USR1 USR2 TERM
"""
FOUND_WHILE_IT_ASKS_THE_NODES = """
job_state() { [ ! -e found ] && echo RUNNING || echo COMPLETING; }
silent_nodes() { # while it asks the nodes, SLURM finds the lost one and sends TERM
  touch found
  echo 'srun: error: Node failure on n2' >>log
  kill -TERM $$
  sleep 0.1
  echo n2
}
"""
FOUND_AT_ONCE = """
echo 'srun: error: Node failure on n2' >>log
job_state() { [ -e asked ] && echo COMPLETING || { touch asked && echo RUNNING; }; }
"""


@pytest.mark.parametrize("found", [FOUND_AT_ONCE, FOUND_WHILE_IT_ASKS_THE_NODES], ids=["at once", "later"])
def test_a_lost_node_that_slurm_finds_late_ends_the_attempt_once(found: str, tmp_path: Path) -> None:
    """After the script has first asked SLURM."""
    script = f"{LOST_NODE}{found}judge\n"
    outcome = run("-euo", "pipefail", "-c", script, "bash", str(tmp_path))
    assert outcome.returncode == 1, outcome
    (line,) = outcome.stdout.splitlines()
    assert line.startswith("train_7b: attempt 0 ends 20"), outcome
    assert "node n2 has failed: SLURM puts the job back into the queue" in line, outcome


def test_a_python_without_packages_is_one_line() -> None:
    """Without site-packages and the repository."""
    outcome = subprocess.run(
        [sys.executable, "-I", "-S", "slurm/run_facts.py", "recipes/smoke_mntp.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("ModuleNotFoundError: No module named")
    assert len(outcome.stderr.splitlines()) == 1


def conclusion(found: list[tuple[str, str]], nodes: str) -> str:
    """That of `slurm/preflight.py`."""
    sys.path.insert(0, str(ROOT / "slurm"))
    try:
        said: str = importlib.import_module("preflight").conclusion(found, nodes.split())
    finally:
        sys.path.remove(str(ROOT / "slurm"))
    return said


def test_preflight_blames_a_node_only_for_what_other_nodes_lack() -> None:
    disk, clock = "disk: TMPDIR=/x cannot be written", "clock: +30 s"
    assert conclusion([("n2", disk)], "n1 n2 n3").startswith("n2 is not fit: submit with --exclude=n2,")
    assert "--exclude=n2,n3," in conclusion([("n2", disk), ("n3", clock)], "n1 n2 n3")
    same = conclusion([("n1", disk), ("n2", disk)], "n1 n2")
    assert "every node has the same error, so a setting or a shared disk is at fault" in same
    assert "--exclude" not in same
    assert "common cause" in conclusion([("n1", disk), ("n2", clock)], "n1 n2")
    assert "n1 is not fit" in conclusion([("n2", disk), ("n3", disk)], "n1 n2 n3")
    assert "only this node" in conclusion([("n1", disk)], "n1")
    assert "do not reach each other" in conclusion(
        [("n1", "all-reduce: timed out"), ("n2", "all-reduce: rank 1 does not answer")], "n1 n2"
    )


def test_a_plain_submission_is_the_7b_recipe_on_four_nodes_of_eight() -> None:
    text = (ROOT / "slurm" / "train_7b.sh").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR1@600", "--requeue"}
    assert wanted <= set(options)
    assert not any(option.startswith(("--partition", "--account")) for option in options)
    assert "recipe=recipes/mistral_7b_instruct/mntp.yaml" in text
