"""What vLLM makes of exports, in a process of its own that loads one after the other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.served_encoders import TEXTS
from tests.support.servers import guarded
from tests.support.serving_environment import clean_environment

CHILD = Path(__file__).resolve().parents[1] / "serving" / "vllm_child.py"


def vllm_environment(bin_folder: Path) -> dict[str, str]:
    """For vLLM on a CPU, in one process where it can be; what it caches stays in its environment."""
    return clean_environment(
        PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        OMP_NUM_THREADS="1",
        VLLM_CACHE_ROOT=str(bin_folder.parent / "cache"),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
    )


def job(folder: Path, texts: list[str] = TEXTS, **options: Any) -> dict[str, Any]:
    """`options` are those of `vllm serve`."""
    return {"folder": str(folder), "texts": texts, "options": options}


def done(bin_folder: Path, jobs: list[dict[str, Any]], folder: Path) -> list[np.ndarray | str]:
    """Vectors of each, `[N, D]`, or what vLLM says in refusing."""
    questions, answers = folder / "jobs.json", folder / "answers.json"
    questions.write_text(json.dumps(jobs))
    command = [str(bin_folder / "python"), str(CHILD), str(questions), str(answers)]
    with guarded(command, vllm_environment(bin_folder), folder / "log.txt") as child:
        assert child.wait() == 0, (folder / "log.txt").read_text(errors="replace")[-3000:]
    found = json.loads(answers.read_text())
    return [answer["refused"] if "refused" in answer else np.array(answer["vectors"]) for answer in found]
