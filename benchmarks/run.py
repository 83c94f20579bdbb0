"""Compares LLM2Vec-DS with its rivals: the same work, in turn, on this machine.

    python benchmarks/run.py --work simcse --against llm2vec --json

Each tool runs in its own process, A B A B …. This script makes the rivals' environments from the package
index. Texts, LoRA, dtype (fp32 on a CPU) and threads are the same, and all dropouts are 0. It prints
medians with their spread, the ratios of speeds and of peak memories, and the share of the machine's
matrix-product peak. It also prints both first losses (for `encode` the cosine of both tools' vectors).
These must agree. Otherwise the work is not the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llm2vec_kernels.products import cpu_products
from speed.limit import matmul_peak_gflop_per_s, needed_gflop
from speed.rivals import RIVALS, Rival, model_for, python_of
from speed.work import BLOCK_TOKENS, BLOCKS, EXAMPLES, UNITS, WORKS, Spec, make_spec

from llm2vec_ds.ablation.run import hardware

ROOT = Path(__file__).resolve().parents[1]
OURS = Path(__file__).resolve().parent / "speed" / "worker_ours.py"


def run_worker(python: Path | str, worker: Path, spec: Path, threads: int) -> dict[str, Any]:
    """Returns the worker's last line and its peak memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(python), str(worker), str(spec)], stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        sys.exit(f"error: {worker.name} ended with code {process.returncode}, see above")
    result: dict[str, Any] = json.loads(lines[-1])
    return {**result, "peak_mib": usage.ru_maxrss / 1024}


def full_blocks(text: str, model: str) -> str:
    """Returns as much text as fills every step with BLOCKS blocks of BLOCK_TOKENS tokens, none short."""
    from llm2vec_ds.model.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    n_tokens = BLOCKS * (BLOCK_TOKENS - len(tokenizer("")["input_ids"]))
    encoded = tokenizer(text[: 12 * n_tokens], add_special_tokens=False, return_offsets_mapping=True)
    # A cut word may give other tokens. So this searches the next place where the count is right.
    for _, end in encoded["offset_mapping"][n_tokens - 1 :]:
        if len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) == n_tokens:
            return text[:end]
    sys.exit(f"error: the text of --data gives no {n_tokens} tokens for MNTP: give a longer one")


def add_masked_batch(spec: Spec, folder: Path) -> None:
    """Adds the masked batch of our first step for the rivals."""
    sys.path.insert(0, str(OURS.parent))
    import torch
    from worker_ours import recipe_of

    from llm2vec_ds.engine.build import build_stage
    from llm2vec_ds.objectives.mntp.objective import MntpStage

    folder.mkdir()
    stage = build_stage(
        recipe_of(json.loads(spec.write(folder / "spec.json").read_text()), folder), torch.device("cpu")
    )
    assert isinstance(stage, MntpStage)
    rows = stage.global_batch(0)
    batches, _ = stage.batches(0, rows)
    for batch in batches:
        assert batch.labels is not None
        for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            spec.input_ids.append(batch.input_ids[start:end].tolist())
            spec.labels.append(batch.labels[start:end].tolist())


def summary(runs: list[dict[str, Any]], spec: Spec) -> dict[str, Any]:
    seconds = [s for run in runs for s in run["seconds"]]
    median = statistics.median(seconds)
    return {
        f"{UNITS[spec.work]}_per_s": round(spec.n_units / median, 2),
        "seconds_median": round(median, 3),
        "seconds_min": round(min(seconds), 3),
        "seconds_max": round(max(seconds), 3),
        "peak_mib": round(max(run["peak_mib"] for run in runs)),
        "loss": runs[0].get("loss"),
    }


def agreement(ours: dict[str, Any], rival: dict[str, Any]) -> dict[str, Any]:
    """Returns figures that show whether the work was the same."""
    if "vectors" not in ours:
        return {"loss_difference": abs(ours["loss"] - rival["loss"])}
    a, b = np.array(ours["vectors"]), np.array(rival["vectors"])
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"least_cosine": round(float(cosine.min()), 6)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    spec = make_spec(
        arguments.work,
        arguments.model,
        Path(arguments.data) if arguments.data else None,
        arguments.steps,
        arguments.threads,
        arguments.examples,
    )
    if arguments.work == "mntp":
        spec.texts = [full_blocks(" ".join(spec.texts), arguments.model)]
        add_masked_batch(spec, folder / "masked")
    spec.rival_checkpointing = arguments.rival_checkpointing
    ours_spec = spec.write(folder / "ours.json", input_ids=[], labels=[])
    rival: Rival | None = RIVALS.get(arguments.against)
    if rival is not None:
        python = python_of(rival, Path(arguments.environments))
        theirs = spec.write(folder / "rival.json", model=str(model_for(rival, Path(arguments.model), folder)))
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "rival": []}
    for _ in range(arguments.rounds):
        runs["ours"].append(run_worker(sys.executable, OURS, ours_spec, arguments.threads))
        if rival is not None:
            runs["rival"].append(run_worker(python, rival.worker, theirs, arguments.threads))
    ours = summary(runs["ours"], spec)
    result: dict[str, Any] = {
        "work": arguments.work,
        "against": arguments.against,
        "rival_checkpointing": arguments.rival_checkpointing,
        "units": spec.n_units,
        "ours": ours,
    }
    if rival is not None:
        other = summary(runs["rival"], spec)
        result |= {
            "rival": other,
            "speed_ratio": round(other["seconds_median"] / ours["seconds_median"], 2),
            "memory_ratio": round(ours["peak_mib"] / other["peak_mib"], 3),
            **agreement(runs["ours"][0], runs["rival"][0]),
        }
    return result | limits(spec, runs["ours"][0], ours["seconds_median"])


def limits(spec: Spec, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Returns the share of the time that the real tokens' products would take at the machine's peak."""
    config = json.loads((Path(spec.model) / "config.json").read_text())
    n_tokens = run.get("n_tokens") or _n_tokens(spec)
    n_masked = sum(label != -100 for labels in spec.labels for label in labels)
    peak = matmul_peak_gflop_per_s(spec.threads)
    gflop = needed_gflop(spec.work, config, n_tokens, n_masked)
    return {
        "n_tokens": n_tokens,
        "matmul_peak_gflop_per_s": round(peak, 1),
        "fp32_products_by": cpu_products().name,
        "share_of_peak": round(gflop / seconds / peak, 3),
    }


def _n_tokens(spec: Spec) -> int:
    from llm2vec_ds.model.loading import load_tokenizer

    return sum(map(len, load_tokenizer(spec.model)(spec.texts)["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--against", choices=[*RIVALS, "none"], default="none")
    parser.add_argument("--model", help="folder of a Llama-like model (default: the demo's)")
    parser.add_argument(
        "--data", help="folder with STS-B, WikiText-2, UD English (default: text that comes with Python)"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps a round, after an untimed one (default 3)"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=EXAMPLES,
        help="of the supervised batch: fewer if a rival runs out of memory (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=2, help="two rounds are A B A B (default 2)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each tool (default: all cores)"
    )
    parser.add_argument(
        "--environments", default="runs/rivals", help="where rivals are installed (default %(default)s)"
    )
    parser.add_argument(
        "--rival-checkpointing",
        action="store_true",
        help="the rival recomputes its layers in backward, for when it runs out of memory otherwise",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    arguments = parser.parse_args()
    if arguments.against == "sentence-transformers" and arguments.work == "mntp":
        parser.error("sentence-transformers has no MNTP: compare with llm2vec")
    if arguments.model is None:
        from llm2vec_ds.demo.model import demo_model_dir

        arguments.model = str(demo_model_dir())
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LLM2VEC_DS_CACHE", folder)
        result = measure(arguments, Path(folder))
    result["machine"] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")},
        "rival_pins": list(RIVALS[arguments.against].pins) if arguments.against != "none" else [],
    }
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
