"""Compares RMSNorm, rotary embedding and SwiGLU as one operation each with transformers' Llama.

    python benchmarks/row_ops.py

It times forward and backward together, with frozen weights. On a GPU it runs in bf16 and takes the GPU's
own time, without launches, on inputs that are not in its cache. Without a GPU it runs on the CPU in fp32.
There is one JSON line an operation: milliseconds of both, and their ratio (above 1, ours is faster). GB/s
count the bytes that must be read and written, also as a share of a copy's speed on this device. The last
figure is the distance of the results (outputs and gradients, relative, by their norms). Without an
installation, set `PYTHONPATH=.:kernels`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from device_peaks import copy_gb_per_s
from llm2vec_kernels.row_ops import api as row_ops
from transformers.models.llama import modeling_llama as llama

EPS = 1e-5
Case = tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor], int]


def cases(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Returns ours, transformers', the inputs with a gradient, and the least number of elements moved."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, width, heads = options.tokens, options.width, options.width // options.head_dim
    norm = llama.LlamaRMSNorm(width, EPS).to(device, dtype).requires_grad_(False)
    cos, sin = random(1, tokens, options.head_dim), random(1, tokens, options.head_dim)
    both = random(1, tokens, heads, options.head_dim).transpose(1, 2)  # queries, and as many keys
    n_queries = heads - heads // 2

    def rotate(x: torch.Tensor) -> torch.Tensor:
        parts = x.transpose(1, 2)[0].split([n_queries, heads - n_queries], 1)
        return torch.cat(row_ops.rotate(*parts, cos[0], sin[0]), 1)[None].transpose(1, 2)

    def rotate_spelt_out(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(llama.apply_rotary_pos_emb(x[:, :n_queries], x[:, n_queries:], cos, sin), 1)

    return {
        "rms_norm": (lambda x: row_ops.rms_norm(x, norm.weight, EPS)[0], norm, [random(tokens, width)], 5),
        "rotate": (rotate, rotate_spelt_out, [both], 4),
        "swiglu": (
            lambda gate, up: row_ops.gated_unit(gate, up, "silu"),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            [random(tokens, options.inner), random(tokens, options.inner)],
            8,
        ),
    }


def results(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def relative_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Returns the largest relative difference of all tensors."""
    pairs = [(a.flatten().float(), b.flatten().float()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def milliseconds(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> float:
    """Times forward and backward: on a GPU its own time, by replays of a graph; else the median of calls."""
    sets = [[torch.randn_like(x).requires_grad_() for x in inputs] for _ in range(n_sets(inputs))]
    gradient = torch.randn_like(function(*sets[0]))

    def all_sets() -> None:
        for leaves in sets:
            torch.autograd.grad(function(*leaves), leaves, gradient)

    if inputs[0].is_cuda:
        from triton.testing import do_bench_cudagraph

        all_sets()  # compiles the kernels, which a graph's capture must not do
        return float(do_bench_cudagraph(all_sets, rep=60, return_mode="median")) / len(sets)
    all_sets()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        all_sets()
        times.append(1e3 * (time.perf_counter() - started))
    return median(times) / len(sets)


def n_sets(inputs: list[torch.Tensor]) -> int:
    """Returns how many sets of inputs take turns, so that none is still in a GPU's cache."""
    if not inputs[0].is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    return max(1, round(4 * cache / sum(x.nbytes for x in inputs)))


def lines(options: argparse.Namespace, device: torch.device, copy: float) -> Iterator[dict[str, Any]]:
    """Yields one line for each operation. `copy` is the device's own speed in GB/s."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (ours, rival, inputs, moved) in cases(options, device, dtype).items():
        difference = relative_difference(*(results(function, inputs) for function in (ours, rival)))
        times = [milliseconds(function, inputs, options.repeats) for function in (ours, rival)]
        speed = moved * inputs[0].numel() * dtype.itemsize / times[0] / 1e6
        yield {
            "operation": name,
            "shape": list(inputs[0].shape),
            "dtype": str(dtype).removeprefix("torch."),
            "ms": float(f"{times[0]:.4g}"),
            "transformers_ms": float(f"{times[1]:.4g}"),
            "ratio": float(f"{times[1] / times[0]:.3g}"),
            "relative_difference": float(f"{difference:.2g}"),
            "gb_per_s": round(speed, 1),
            "share_of_copy": round(speed / copy, 3),
            "copy_gb_per_s": round(copy, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008, help="width of the feed-forward layers")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls on a CPU (default %(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copy = copy_gb_per_s(device, 2048 if device.type == "cuda" else 64)
    for line in lines(options, device, copy):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
