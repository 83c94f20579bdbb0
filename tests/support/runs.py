"""Training runs as a user starts them: the command in a process of its own, or under the launcher."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from llm2vec_kernels.products import cpu_products

from tests.support.forked import forked_command, own_environment
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]

NO_DROPOUT = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.0, "zero_init": False}}
"""For equalities: nothing random in the forward pass, and gradients that a zero B would hide."""


def choose_library() -> None:
    """For all processes of a test, whose bits are compared: each would measure which is faster."""
    os.environ.setdefault("LLM2VEC_ONEDNN", "1" if cpu_products().name == "oneDNN" else "0")
    cpu_products.cache_clear()


def recipe(stage: str, model: Path, texts: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for tiny models; 16 texts a step in micro-batches of a few texts."""
    own = {"mntp": {"mask_rate": 0.3}, "simcse": {"attention_dropout": 0.0, "scale": 5.0}}[stage]
    return {
        "stage": stage,
        "model": {"path": str(model)},
        "data": {"path": str(texts), "max_tokens": 64},
        "output_dir": str(output),
        "max_steps": 6,
        "batch": {"global_batch_size": 16, "micro_batch_tokens": 160},
        "optimizer": {"lr": 1e-3, "warmup_steps": min(2, changes.get("max_steps", 6))},
        stage: own,
        **changes,
    }


def cut_off(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe of a run in `folder` that was killed after step 5, its last checkpoint that of step 3."""
    whole = Path(values["output_dir"])
    name = "checkpoints/step-00000003"
    shutil.copytree(whole / name, folder / name)
    rows = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:5]) + rows[5][:20])
    return {**values, "output_dir": str(folder), "resume": True}


def write_recipe(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def command(arguments: list[str], ranks: int = 1, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
    """`llm2vec-ds ARGUMENTS`, or the same under `deepspeed --num_gpus RANKS`."""
    if ranks == 1:
        line = [sys.executable, "-m", "llm2vec_ds", *arguments]
    else:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        port = ["--master_port", str(free_port())]
        line = [launcher, "--num_gpus", str(ranks), *port, "--module", "llm2vec_ds", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # More threads than idle cores make it many times slower: `make` says one, beside another worker.
    threads = "1" if ranks > 1 else os.environ.get("OMP_NUM_THREADS", "2")
    environment = own_environment() | {"PATH": path, "OMP_NUM_THREADS": threads}
    return subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout_s, check=False
    )


def noise_in(log: str) -> list[str]:
    """Lines of a log that say nothing of the run: warnings of libraries, bars, devices that are not there."""
    words = re.compile(r"Warning|\[WARNING\]|it/s\]|s/it\]|%\||Setting accelerator|deprecated", re.IGNORECASE)
    return [line for line in log.splitlines() if words.search(line)]


def trained(values: dict[str, Any], ranks: int = 1, *, as_users_do: bool = False) -> list[dict[str, Any]]:
    """Runs the recipe in processes of its own, which must succeed; the rows of its metrics.jsonl.

    Args:
        as_users_do: by `command`, slower: processes then have nothing in common, not even how they hash. Else
            rank R says what it says in OUTPUT_DIR.log.R.
    """
    output = Path(values["output_dir"])
    path, log = write_recipe(values, output.with_suffix(".yaml")), output.with_suffix(".log")
    if as_users_do:
        outcome = command(["train", str(path)], ranks)
        assert outcome.returncode == 0, outcome.stderr[-3000:] + outcome.stdout[-3000:]
        assert not noise_in(outcome.stderr)
    else:
        codes = forked_command(["train", str(path)], ranks, log)
        assert codes == [0] * ranks, [Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(ranks)]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
