"""Compares InfoNCE in tiles with the full score matrix: time and peak memory of forward and backward.

    python benchmarks/info_nce.py --n 32768 --dim 576 --json

There are N queries against N documents, with unit vectors and scale 20. Each case prints one line:

  time_ms                      forward and backward, median of --repeats runs
  peak_extra_mib               largest memory in use over forward and backward, beyond the vectors and their
                               gradients; the full matrix alone is full_matrix_mib
  time_ratio_to_full_matmul    time_ms / baseline_ms
  baseline                     "full_matrix": F.cross_entropy over the N×N scores, forward and backward, where
                               four such matrices fit in free memory; else "matmuls": the bare products of
                               the same loss (scores and two gradients, 6·N²·D operations) in tiles of the
                               same size, without softmax
  time_ratio_to_matmuls        the same against the bare products, always

The tiles, the bare products and the baseline are timed in turn within each repeat. So a busy machine affects
all alike. On CUDA memory is the peak of torch's allocator. On a CPU it is the growth of resident memory
(VmHWM), measured in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from llm2vec_kernels.info_nce.api import TILE_MIB, info_nce

SCALE = 20.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLES = {
    "cpu": [(4096, 576), (16384, 576), (32768, 576)],
    "cuda": [(n, dim) for dim in (1024, 4096) for n in (4096, 32768, 131072, 262144, 1048576)],
}


def vectors(n: int, dim: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns queries and documents. Each query leans towards its document."""
    torch.manual_seed(0)
    document = F.normalize(torch.randn(n, dim, device=device), dim=-1)
    query = F.normalize(torch.randn(n, dim, device=device).mul_(dim**-0.5).add_(document), dim=-1)
    return query.to(dtype).requires_grad_(), document.to(dtype).requires_grad_()


def tiled(query: torch.Tensor, document: torch.Tensor, tile_mib: float) -> None:
    positive = torch.arange(len(query), device=query.device)
    info_nce(query, document, positive, scale=SCALE, tile_mib=tile_mib).loss_Q.mean().backward()


def full_matrix(query: torch.Tensor, document: torch.Tensor) -> None:
    positive = torch.arange(len(query), device=query.device)
    F.cross_entropy((SCALE * query @ document.T).float(), positive).backward()


def matmuls(query: torch.Tensor, document: torch.Tensor, tile_mib: float) -> None:
    """Computes the products of scores and both gradients alone, a tile at a time."""
    query, document = query.detach(), document.detach()
    d_query, d_document = torch.empty_like(query), torch.zeros_like(document)
    n_rows = max(64, int(tile_mib * 2**20) // (query.element_size() * len(document)))
    score = query.new_empty(n_rows, len(document))
    for start in range(0, len(query), n_rows):
        rows = slice(start, start + n_rows)
        tile = score[: len(query[rows])]
        torch.mm(query[rows], document.T, out=tile)
        torch.mm(tile, document, out=d_query[rows])
        d_document.addmm_(tile.T, query[rows])


def seconds(run: Callable[[], None], device: str, leaves: tuple[torch.Tensor, ...]) -> float:
    for leaf in leaves:
        leaf.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_mib(field: str) -> float:
    """Returns a field of /proc/self/status, VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory on a CPU needs Linux")


def peak_extra_mib(n: int, dim: int, dtype: torch.dtype, device: str, tile_mib: float) -> float:
    """Returns the peak over one forward and backward, beyond the vectors and gradients that exist before."""
    if device == "cpu":
        tiled(*vectors(256, dim, dtype, device), tile_mib)  # makes the libraries' buffers and threads
    leaves = vectors(n, dim, dtype, device)
    gradient_mib = sum(x.nbytes for x in leaves) / 2**20
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        tiled(*leaves, tile_mib)
        return torch.cuda.max_memory_allocated() / 2**20 - before - gradient_mib
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = resident_mib("VmRSS")
    tiled(*leaves, tile_mib)
    return resident_mib("VmHWM") - before - gradient_mib


def peak_in_own_process(args: argparse.Namespace, n: int, dim: int) -> float:
    line = [sys.executable, __file__, "--peak-only", "--n", str(n), "--dim", str(dim)]
    line += ["--dtype", args.dtype, "--device", args.device, "--tile", str(args.tile)]
    return float(subprocess.check_output(line, text=True))


def free_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(args: argparse.Namespace, n: int, dim: int) -> dict[str, object]:
    dtype, device = DTYPES[args.dtype], args.device
    peak = peak_in_own_process(args, n, dim)
    leaves = vectors(n, dim, dtype, device)
    full_mib = n * n * 4 / 2**20
    runs = {"tiled": lambda: tiled(*leaves, args.tile), "matmuls": lambda: matmuls(*leaves, args.tile)}
    if 4 * full_mib < free_mib(device):
        runs["full_matrix"] = lambda: full_matrix(*leaves)
    for run in runs.values() if device == "cuda" else ():
        run()  # compiles, picks algorithms
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats or (1 if device == "cpu" and n > 16384 else 3)):
        for name, run in runs.items():
            times[name].append(seconds(run, device, leaves))
    median = {name: statistics.median(values) for name, values in times.items()}
    baseline = "full_matrix" if "full_matrix" in runs else "matmuls"
    return {
        "benchmark": "info_nce",
        "n": n,
        "dim": dim,
        "dtype": args.dtype,
        "tile_mib": args.tile,
        "time_ms": round(median["tiled"] * 1e3, 2),
        "peak_extra_mib": round(peak, 1),
        "full_matrix_mib": round(full_mib, 1),
        "time_ratio_to_full_matmul": round(median["tiled"] / median[baseline], 3),
        "time_ratio_to_matmuls": round(median["tiled"] / median["matmuls"], 3),
        "baseline": baseline,
        "baseline_ms": round(median[baseline] * 1e3, 2),
        "matmuls_ms": round(median["matmuls"] * 1e3, 2),
        "tflop_per_s": round(6 * n * n * dim / median["tiled"] / 1e12, 3),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": metadata.version("torch"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--n", type=int, help="queries and documents; without it, a table over several")
    parser.add_argument("--dim", type=int, help="width of the vectors; without it, 576 (1024 on CUDA)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32" if default_device == "cpu" else "bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--tile", type=float, default=TILE_MIB, help="MiB of scores held (%(default)s)")
    parser.add_argument("--repeats", type=int, help="timed runs of each (3; on a CPU 1 above N = 16384)")
    parser.add_argument("--json", action="store_true", help="one JSON line a case instead of a table")
    parser.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    default_dim = 576 if args.device == "cpu" else 1024
    cases = [(args.n, args.dim or default_dim)] if args.n else TABLES[args.device]
    if args.peak_only:
        (n, dim) = cases[0]
        print(peak_extra_mib(n, dim, DTYPES[args.dtype], args.device, args.tile))
        return
    shown = (
        "n",
        "dim",
        "time_ms",
        "peak_extra_mib",
        "full_matrix_mib",
        "time_ratio_to_full_matmul",
        "baseline",
    )
    if not args.json:
        print(*(f"{name:>15.15}" for name in shown))
    for n, dim in cases:
        row = measure(args, n, dim)
        print(json.dumps(row) if args.json else " ".join(f"{row[name]!s:>15}" for name in shown), flush=True)


if __name__ == "__main__":
    main()
