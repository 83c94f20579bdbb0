"""Compares the contrastive loss as training calls it, forward and backward, with the full score matrix.

    python benchmarks/contrastive_loss.py --n 32768 --dim 1024

Vectors of N queries and N documents come in fp32, as pooling gives them. Ours normalises them and runs
InfoNCE in tiles, in each precision that a recipe can ask for. The others hold all N×N scores and call
`F.cross_entropy`; their products are in fp32, TF32 and bf16. They run where four such matrices fit into
free memory.

It prints one JSON line a case: milliseconds (median), useful TFLOP/s (6·N²·D operations: scores and two
gradients) and memory beyond vectors and gradients. The line also has the relative distance of the loss and
the queries' gradient from those of the full matrix in fp32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from device_peaks import seconds_of

from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors
from llm2vec_ds.recipe.objectives import SimcseConfig

SCALE = 20.0
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(query: torch.Tensor, document: torch.Tensor, score_precision: Any = "fp32") -> torch.Tensor:
    """Computes the loss by the product's own call, on one rank and without hard negatives."""
    ids = torch.arange(len(query), device=query.device)
    vectors = PairVectors(query, document, document[:0], ids, ids, ids[:0])
    config = SimcseConfig(scale=SCALE, score_precision=score_precision)
    return ContrastiveLoss(config)(vectors, torch.tensor(SCALE, device=query.device)).share


def full_matrix(query: torch.Tensor, document: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    query, document = (F.normalize(x, dim=-1).to(dtype) for x in (query, document))
    target = torch.arange(len(query), device=query.device)
    return F.cross_entropy((SCALE * query @ document.T).float(), target)


def vectors(n: int, dim: int, device: torch.device) -> list[torch.Tensor]:
    """Returns vectors that are not normalised. Each query leans towards its document."""
    torch.manual_seed(0)
    document = torch.randn(n, dim, device=device)
    query = torch.randn(n, dim, device=device) + document
    return [query.requires_grad_(), document.requires_grad_()]


def run(loss: Loss, leaves: list[torch.Tensor]) -> torch.Tensor:
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return value.detach()


def measure(
    loss: Loss, leaves: list[torch.Tensor], repeats: int
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Returns the figures, the loss and the queries' gradient."""
    device, (n, dim) = leaves[0].device, leaves[0].shape
    result = [run(loss, leaves)]  # compiles, picks algorithms
    result.append(leaves[0].grad.clone())  # type: ignore[union-attr]
    if device.type == "cuda":
        run(loss, leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = memory_mib(device)
    seconds = median(seconds_of(lambda: run(loss, leaves), device) for _ in range(repeats))
    figures = {
        "ms": round(1e3 * seconds, 2),
        "useful_tflop_per_s": round(6 * n * n * dim / seconds / 1e12, 2),
    }
    if device.type == "cuda":
        # Gradients exist before and after. They are freed in between.
        figures["extra_mib"] = round(torch.cuda.max_memory_allocated() / 2**20 - before, 1)
    return figures, result


def memory_mib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def contenders(n: int, device: torch.device) -> dict[str, tuple[Loss, str]]:
    """Returns name → loss, and torch's precision of fp32 products. The others are compared with the first."""
    fp32: Loss = partial(full_matrix, dtype=torch.float32)
    full: dict[str, tuple[Loss, str]] = {
        "full_fp32": (fp32, "highest"),
        "full_tf32": (fp32, "high"),
        "full_bf16": (partial(full_matrix, dtype=torch.bfloat16), "highest"),
    }
    on_cuda = device.type == "cuda"
    if on_cuda and 4 * n * n * 4 > torch.cuda.mem_get_info()[0]:
        full = {}
    in_each = {f"ours_{name}": (partial(ours, score_precision=name), "highest") for name in ("tf32", "bf16")}
    return {**full, "ours": (ours, "highest"), **in_each}


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> dict[str, float]:
    names = ("loss", "gradient")
    return {
        f"{name}_difference": float(f"{float((x - y).norm() / y.norm()):.2g}")
        for name, x, y in zip(names, a, b, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dim", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for n in options.n:
        for dim in options.dim:
            leaves, exact = vectors(n, dim, device), None
            for name, (loss, precision) in contenders(n, device).items():
                torch.set_float32_matmul_precision(precision)
                figures, result = measure(loss, leaves, options.repeats)
                exact = exact or result
                line = {"benchmark": "contrastive_loss", "n": n, "dim": dim, "case": name, **figures}
                line |= apart(result, exact)
                line["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
                print(json.dumps({**line, "torch": version("torch")}), flush=True)


if __name__ == "__main__":
    main()
