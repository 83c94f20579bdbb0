"""`slurm/pipeline_7b.sh` runs through, and its encoder encodes a corpus as a job array."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.slurm_cluster import ROOT, Cluster, search_path

pytestmark = pytest.mark.slow

STAGES = ("mntp", "simcse", "supervised")


@pytest.fixture(scope="module")
def recipes(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped smoke recipes on a tiny model, in a folder of their own."""
    folder = tmp_path_factory.mktemp("recipes")
    for stage in STAGES:
        text = (ROOT / "recipes" / f"smoke_{stage}.yaml").read_text()
        recipe = yaml.safe_load(text.replace("runs/smoke_", f"{folder}/runs/"))
        if stage == "mntp":
            recipe["model"] = values["model"]
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_every_stage_after_the_one_before(cluster: Cluster, recipes: Path) -> None:
    pairs = ROOT / "llm2vec_ds" / "assets" / "sentence_pairs.csv"
    outcome = cluster.run(
        "slurm/pipeline_7b.sh",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        f"{recipes}/",
        "max_steps=2",
        "--",
        "--task",
        f"sts:{pairs}",
        SBATCH_OUTPUT=f"{cluster.folder}/%x-%j.out",
    )
    assert outcome.returncode == 0, outcome.stderr
    jobs = dict(re.findall(r"(\w+): job (\d+)", outcome.stdout))
    assert list(jobs) == ["prepare", *STAGES, "evaluate"]
    for job in jobs.values():
        state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"]
        assert state == "COMPLETED", cluster.log(job)
    starts = [cluster.job(job)["StartTime"] for job in jobs.values()]
    ends = [cluster.job(job)["EndTime"] for job in jobs.values()]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    # Prepared once: later stages find their texts although their tokenizer is another folder's.
    assert "prepared " in cluster.log(jobs["prepare"])
    for stage in STAGES:
        assert not re.search(r"^prepared ", cluster.log(jobs[stage]), re.MULTILINE), cluster.log(jobs[stage])
    assert list((recipes / "runs" / "supervised" / "evaluation").iterdir())


def test_a_stage_that_fails_cancels_those_after_it(cluster: Cluster, recipes: Path) -> None:
    outcome = cluster.run(
        "slurm/pipeline_7b.sh",
        f"{recipes}/",
        "data.path=/nowhere.txt",
        SBATCH_OUTPUT=f"{cluster.folder}/%x-%j.out",
    )
    first, *others = re.findall(r"job (\d+)", outcome.stdout)
    assert cluster.wait_for_state(first, "COMPLETED", "FAILED")["JobState"] == "FAILED"
    assert "/nowhere.txt" in cluster.log(first)
    for job in others:
        cluster.wait_for_state(job, "CANCELLED")


def test_a_corpus_in_shards(cluster: Cluster, values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(f"line {n}" for n in range(20)) + "\n")
    line = (
        "slurm/encode.sh",
        values["model"]["path"],
        str(tmp_path / "corpus.txt"),
        str(tmp_path / "vectors"),
    )
    options = ("--array=0-2", "--gpus-per-node=0", "--cpus-per-task=1")
    job = cluster.submit(*line, options=options)
    for index in range(3):
        state = cluster.wait_for_state(f"{job}_{index}", "COMPLETED", "FAILED")["JobState"]
        assert state == "COMPLETED", cluster.log(f"{job}_{index}")
    shards = sorted((tmp_path / "vectors").glob("*.npy"))
    assert sum(len(np.load(shard)) for shard in shards) == 20
    assert len(shards) == 3
    job = cluster.submit(*line[:2], "/nowhere.txt", line[3], options=options)
    for index in range(3):
        cluster.wait_for_state(f"{job}_{index}", "FAILED")
        last = cluster.log(f"{job}_{index}").splitlines()[-1]
        assert f"shard {index} of 3 failed (code 2)" in last
        assert "llm2vec-ds: error: " in last


def test_commands_of_the_guide_are_accepted(cluster: Cluster) -> None:
    """By SLURM, for their nodes and GPUs; by the scripts' own readers, in test_scripts and above."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    commands = [
        line.strip()
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if line.strip().startswith("sbatch ")
    ]
    assert "sbatch slurm/train_7b.sh" in commands
    for command in commands:
        outcome = cluster.run(*command.replace("sbatch ", "sbatch --test-only ", 1).split())
        assert outcome.returncode == 0, f"{command}: {outcome.stderr}"
        for recipe in re.findall(r"recipes/\S+\.yaml", command):
            assert (ROOT / recipe).is_file(), command


def test_site_settings_are_read_by_sbatch(cluster: Cluster) -> None:
    """What is commented out in site.env is valid too."""
    text = (ROOT / "slurm" / "site.env").read_text()
    variables = re.findall(r"^(?:# )?export (\w+)=", text, re.MULTILINE)
    program = Path(shutil.which("sbatch", path=search_path()) or "").read_bytes()
    for name in (name for name in variables if name.startswith("SBATCH_")):
        assert name.encode() in program, name
    outcome = cluster.run("bash", "-c", "source slurm/site.env && sbatch --test-only slurm/train_7b.sh")
    assert outcome.returncode == 0, outcome.stderr
    refused = cluster.run("sbatch", "--test-only", "slurm/train_7b.sh", SBATCH_PARTITION="nowhere")
    assert "invalid partition" in refused.stderr
