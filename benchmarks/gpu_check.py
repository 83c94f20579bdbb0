"""Runs checks and benchmarks on this machine's GPU. `make gpu-check` calls it. Each part has a results file.

    python benchmarks/gpu_check.py --part kernels
    python benchmarks/gpu_check.py --part training --rows train_mntp_4670 mntp_7b

Every row is a separate process and ends after at most 45 seconds. A part ends after four minutes. The file
is written after each row, so a run that is cut keeps its rows. A row that runs again on the same day
replaces its earlier result. All parts need torch with CUDA, triton, transformers and peft. The parts
`training` and `contrastive` also need what `llm2vec-ds train` needs, and sentence-transformers. `tests`
needs pytest and hypothesis. If Python cannot store the libraries' bytecode, importing takes most of a row's
time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
ROW_S, PART_S = 45.0, 240.0
ROW_OPS_BOUND = 2**-7
"""Allowed distance of bf16 results from transformers', which round differently: relative, by their norms."""
VERSIONS = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "deepspeed",
    "sentence-transformers",
    "flash-attn",
    "flash-attn-3",
)
ATTENTION = "benchmarks/attention.py --flex none --mixes sts wiki blocks long --lengths 4096 --head-dims"
"""FlexAttention is left out, because compiling it alone exceeds a row's limit. Run it by hand."""
HOST = "benchmarks/host_overhead.py"
PARTS = {
    "kernels": {
        "checks_long": "benchmarks/kernel_checks.py --texts long",
        "checks_short": "benchmarks/kernel_checks.py --texts short",
        "row_ops_7b": "benchmarks/row_ops.py",
        "row_ops_135m": "benchmarks/row_ops.py --tokens 16384 --width 576 --inner 1536 --head-dim 64",
        "contrastive_loss": "benchmarks/contrastive_loss.py",
        "info_nce_131072": "benchmarks/info_nce.py --n 131072 --dim 1024 --json",
        "attention_128": f"{ATTENTION} 128",
        "attention_64": f"{ATTENTION} 64",
        "attention_256": f"{ATTENTION} 256",
    },
    "training": {
        "train_mntp_4670": "benchmarks/train_gpu.py mntp",
        "train_mntp_16384": "benchmarks/train_gpu.py mntp --tokens 16384",
        "mntp_7b": "benchmarks/mntp_gpu.py --recomputation none selective",
        "host_overhead": f"{HOST} --parts train --engines zero2 --warm-up 2 --steps 3",
        "host_encode": f"{HOST} --parts encode",
        "encode": "benchmarks/encode_gpu.py --batch-sizes 128 512 --divide 2",
    },
    "contrastive": {
        "train_simcse": "benchmarks/train_gpu.py simcse",
        "train_cached": "benchmarks/train_gpu.py cached --steps 2 --warm-up 1",
        "train_supervised": "benchmarks/train_gpu.py supervised --steps 2 --warm-up 1",
    },
    "tests": {
        "tests": "-m pytest -q -m not\\ slow -p no:cacheprovider tests/model/test_graphs.py tests/kernels"
    },
}
"""The most important rows come first. A part leaves out rows that it has no time for."""


def hardware(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver_and_power_limit": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS if name in installed},
    }


def run_row(command: str, limit_s: float) -> dict[str, Any]:
    """Returns what a child printed and how it ended. Its output counts even if it ran out of time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:2], *inherited()])}
    environment.pop("TRITON_INTERPRET", None)
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    cut = False
    try:
        output, _ = child.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        cut = True
        os.killpg(child.pid, signal.SIGKILL)  # its own children too: a living one holds the pipe open
        output, _ = child.communicate()
    print(output, flush=True)
    lines = output.splitlines()
    return {
        "command": f"python {command}",
        "seconds": round(time.monotonic() - started, 1),
        "exit_status": child.returncode,
        "cut": cut,
        "lines": [json.loads(line) for line in lines if line.startswith("{")],
        "said_last": lines[-3:] if child.returncode or not lines else lines[-1:],
    }


def inherited() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def problems(name: str, row: dict[str, Any]) -> Iterable[str]:
    """Returns a row's problems. A row that hit its time limit is no problem if it has figures."""
    if row["exit_status"] and not row["cut"]:
        yield f"{name}: exit status {row['exit_status']}"
    if name == "tests":
        if row["cut"]:
            yield f"{name}: not finished within the limit"
    elif not row["lines"]:
        yield f"{name}: no figures" + (" within its limit" if row["cut"] else "")
    for line in row["lines"]:
        if line.get("ok") is False:
            yield f"{name}: {line['check']} is off"
        if "operation" in line and not line["relative_difference"] < ROW_OPS_BOUND:
            yield f"{name}: {line['operation']} off by {line['relative_difference']}"


def run_part(
    part: str, wanted: list[str] | None, path: Path, about: dict[str, Any], row_s: float, part_s: float
) -> list[str]:
    """Runs the rows of a part and writes them. Returns what went wrong."""
    result = {**about, "part": part, "rows": earlier_rows(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + part_s
    failed: list[str] = []
    for name, command in PARTS[part].items():
        if wanted and name not in wanted:
            continue
        left = until - time.monotonic()
        if left < row_s / 2:
            failed.append(f"{name}: left out, the part's {part_s:.0f} s are over")
            continue
        row = run_row(command, left if part == "tests" else min(row_s, left))
        failed += problems(name, row)
        result["rows"][name] = {**row, "date": about["date"], "commit": about["commit"]}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return failed


def earlier_rows(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def commit_here() -> str | None:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", nargs="+", help="these rows alone")
    parser.add_argument("--row-seconds", type=float, default=ROW_S, help="default %(default)s")
    parser.add_argument("--part-seconds", type=float, default=PART_S, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default=commit_here(), help="what is measured (default: git says it)")
    options = parser.parse_args(arguments)
    known = [name for part in options.part for name in PARTS[part]]
    if unknown := [name for name in options.rows or [] if name not in known]:
        parser.error(f"no row {', '.join(unknown)}: choose from {', '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print(
            f"error: torch of {sys.executable} sees no CUDA device: make gpu-check PYTHON=/path/to/python3",
            file=sys.stderr,
        )
        return 2
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **hardware(torch)}
    about["commit"] = options.commit
    gpu = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    failed: list[str] = []
    for part in options.part:
        path = options.output / f"{about['date'][:10]}_{gpu}_{part}.json"
        failed += run_part(part, options.rows, path, about, options.row_seconds, options.part_seconds)
        print(f"{path} is written", flush=True)
    print(f"FAILED: {'; '.join(failed)}" if failed else "all checks pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
