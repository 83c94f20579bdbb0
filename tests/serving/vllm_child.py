"""`python vllm_child.py JOBS ANSWERS`, by vLLM's own Python: what vLLM makes of folders, one after the other.

A job is `{"folder": …, "texts": […], "options": {…}}`, an answer its vectors as they come, or `refused`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 1024,
    "max_model_len": 512,
}


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """With no more of vLLM left in memory than before."""
    try:
        model = LLM(job["folder"], runner="pooling", **SMALL, **job["options"])
        outputs = model.embed(job["texts"], use_tqdm=False)
        return {"vectors": [output.outputs.embedding for output in outputs]}
    except Exception as error:  # of any class: vLLM's refusals have none in common
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    finally:
        model = None
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    jobs, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([answered(job) for job in json.loads(jobs.read_text())]))
