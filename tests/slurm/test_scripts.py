"""The scripts of `slurm/` without a cluster: syntax, help, mistakes, and that their options are sound."""

from __future__ import annotations

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
    (line,) = [
        x for x in (ROOT / "slurm" / "prepare.sh").read_text().splitlines() if x.startswith("read_model=")
    ]
    code = line.removeprefix("read_model=").strip("'")
    command = [sys.executable, "-c", code, "recipes/smoke_mntp.yaml", "model.path=my/llm"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.stdout == "my/llm\n", outcome.stderr


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
        (["train_7b.sh", "--nodes=1"], {"SLURM_JOB_ID": "1"}, "before the script"),
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


def test_a_plain_submission_is_the_7b_recipe_on_four_nodes_of_eight() -> None:
    text = (ROOT / "slurm" / "train_7b.sh").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR1@600", "--requeue"}
    assert wanted <= set(options)
    assert not any(option.startswith(("--partition", "--account")) for option in options)
    assert "recipe=recipes/mistral_7b_instruct/mntp.yaml" in text
