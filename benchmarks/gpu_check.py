"""Kernel tests and the kernels' benchmarks on this machine's GPU, into one file. Run by `make gpu-check`.

Needs torch with CUDA, triton, transformers and peft; with pytest and hypothesis the kernels' tests run too,
beside the numerical checks that this script makes itself. Each part has a time limit, less than nine minutes
together, and the file is written after each, so that what was measured is there whatever comes after.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
BUDGET_S = 525
CHECKS_S = 120
"""No check starts later: the first run of each compiles its kernels."""
ROW_OPS_BOUND = 2**-7
"""How far results of bf16 may be from transformers', whose roundings are others: relative, by their norms."""
VERSIONS = ("torch", "triton", "transformers", "peft", "flash-attn", "flash-attn-3")
# (dtype, query heads, key/value heads, head dim, options)
CHECKS: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    ("bfloat16", 8, 8, 64, {}),
    ("bfloat16", 9, 3, 64, {"window": 100}),
    ("float16", 8, 1, 128, {"softcap": 5.0}),
    ("bfloat16", 4, 2, 80, {}),
    ("bfloat16", 4, 4, 96, {"window": 30}),
    ("bfloat16", 4, 2, 256, {"softcap": 30.0}),
    ("float32", 4, 2, 64, {"softcap": 5.0}),
    ("float32", 2, 2, 256, {}),
)
LENGTHS = {"long": (0, 1, 127, 128, 129, 0, 515), "short": (13, 1, 0, 63, 64, 17) * 4}


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


def check_numbers(torch: Any, device: str = "cuda") -> list[dict[str, Any]]:
    """Every one of `CHECKS` on every one of `LENGTHS`."""
    lines = []
    until = time.monotonic() + CHECKS_S
    for check, (mix, lengths) in itertools.product(CHECKS, LENGTHS.items()):
        if time.monotonic() > until:
            print(f"checks stop after {CHECKS_S} s, at {check} on {mix} texts", flush=True)
            break
        started = time.monotonic()
        errors, naive_errors = errors_against_reference(torch, device, lengths, *check)
        dtype, heads, kv_heads, head_dim, options = check
        line = {
            "check": f"{dtype}, {heads}/{kv_heads} heads, head dim {head_dim}, {options}, {mix} texts",
            "error_out_dq_dk_dv": errors,
            "naive_error": naive_errors,
            "seconds": round(time.monotonic() - started, 1),
            "ok": all(a <= 2 * b + 1e-6 for a, b in zip(errors, naive_errors, strict=True)),
        }
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


def errors_against_reference(
    torch: Any,
    device: str,
    lengths: tuple[int, ...],
    dtype_name: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    options: dict[str, Any],
) -> tuple[list[float], list[float]]:
    """Largest errors of output, dq, dk, dv against double precision: ours, and naive PyTorch's."""
    from llm2vec_kernels import reference
    from llm2vec_kernels.flash_attention import flash_attention

    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    dtype = getattr(torch, dtype_name)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    options = {"softmax_scale": head_dim**-0.5, **options}

    def ours(*qkv: Any) -> Any:
        return flash_attention(*qkv, cu_seqlens, max(lengths), **options)

    def plain(*qkv: Any) -> Any:
        return reference.attention(*qkv, cu_seqlens, **options)

    def results(function: Any, dtype: Any) -> list[Any]:
        *leaves, weight = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    exact = results(plain, torch.float64)

    def errors(computed: list[Any]) -> list[float]:
        return [float((x.double() - t).abs().max()) for x, t in zip(computed, exact, strict=True)]

    return errors(results(ours, dtype)), errors(results(plain, dtype))


def run_script(arguments: list[str], limit_s: float) -> tuple[int, list[str]]:
    """Exit status and lines of output of a child; what it said counts even where it ran out of time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    environment.pop("TRITON_INTERPRET", None)
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own children too: one that lives holds the pipe
        output, _ = child.communicate()
    print(output, flush=True)
    return child.returncode, output.splitlines()


def json_lines(lines: list[str]) -> list[Any]:
    return [json.loads(line) for line in lines if line.startswith("{")]


def kernel_tests(limit_s: float) -> dict[str, Any]:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"ran": False, "reason": f"{' and '.join(missing)} not installed"}
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    status, lines = run_script(["-m", "pytest", *options, "tests/kernels"], limit_s)
    return {"ran": True, "exit_status": status, "summary": lines[-1] if lines else ""}


def figures(arguments: list[str], limit_s: float, crashed: list[str]) -> list[Any]:
    """What a benchmark printed. Ended by its limit is not crashed: what it said by then counts."""
    status, lines = run_script(arguments, limit_s)
    if status > 0:
        crashed.append(f"{' '.join(arguments)}: exit status {status}")
    return json_lines(lines)


def info_nce_benchmark(deadline: float, crashed: list[str]) -> list[Any]:
    """N up to a million while time lasts."""
    lines: list[Any] = []
    for n, dim in ((4096, 1024), (32768, 4096), (131072, 1024), (131072, 4096), (1_000_000, 1024)):
        if time.monotonic() < deadline - 5:
            arguments = ["benchmarks/info_nce.py", "--n", str(n), "--dim", str(dim), "--json"]
            lines += figures(arguments, deadline - time.monotonic(), crashed)
    return lines


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(
            f"error: torch of {sys.executable} sees no CUDA device: make gpu-check PYTHON=/path/to/python3",
            file=sys.stderr,
        )
        return 2
    started = time.monotonic()
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **hardware(torch)}
    gpu = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"{result['date'][:10]}_{gpu}.json"
    # Without FlexAttention, whose compilation alone outlasts the limit: its case is run by hand.
    attention = ["benchmarks/attention.py", "--flex", "none", "--deadline-s", "130"]
    crashed: list[str] = []
    parts: dict[str, Callable[[], Any]] = {
        "checks": lambda: check_numbers(torch),
        "row_ops": lambda: figures(["benchmarks/row_ops.py"], 40, crashed),
        "attention": lambda: figures(attention, 160, crashed),
        "info_nce": lambda: info_nce_benchmark(time.monotonic() + 90, crashed),
        "tests": lambda: kernel_tests(min(130, started + BUDGET_S - time.monotonic())),
    }
    for name, part in parts.items():
        result[name] = part()
        result["seconds"] = round(time.monotonic() - started)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [line["check"] for line in result["checks"] if not line["ok"]]
    failed += crashed
    failed += [f"{name}: no figures" for name in ("row_ops", "attention", "info_nce") if not result[name]]
    failed += [
        f"{line['operation']}: off by {line['relative_difference']}"
        for line in result["row_ops"]
        if not line["relative_difference"] < ROW_OPS_BOUND
    ]
    if n_left_out := len(CHECKS) * len(LENGTHS) - len(result["checks"]):
        failed.append(f"{n_left_out} checks not made within {CHECKS_S} s")
    if result["tests"].get("exit_status"):
        failed.append(f"kernel tests: {result['tests']['summary']}")
    print(
        f"{path}: {result['seconds']} s; " + (f"FAILED: {'; '.join(failed)}" if failed else "all checks pass")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
