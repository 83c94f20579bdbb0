"""RMSNorm, rotary embedding and SwiGLU as one operation each, against transformers' Llama spelt out.

    python benchmarks/row_ops.py

Forward and backward together, weights frozen. One JSON line an operation: milliseconds of both, their ratio
(above 1: ours is faster), GB/s of what must be read and written at least, and how far apart the results are
(outputs and gradients, relative, by their norms). On the GPU in bf16 if there is
one, else on the CPU in fp32. Without an installation: `PYTHONPATH=.:kernels`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from llm2vec_kernels import row_ops
from transformers.models.llama import modeling_llama as llama

EPS = 1e-5
Case = tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor], int]


def cases(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Ours, transformers', the inputs that have a gradient, and elements moved at least."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, width, heads = options.tokens, options.width, options.width // options.head_dim
    norm = llama.LlamaRMSNorm(width, EPS).to(device, dtype).requires_grad_(False)
    cos, sin = random(1, tokens, options.head_dim), random(1, tokens, options.head_dim)
    queries = random(1, tokens, heads, options.head_dim).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return row_ops.rotate(x.transpose(1, 2)[0], cos[0], sin[0])[None].transpose(1, 2)

    def rotate_spelt_out(x: torch.Tensor) -> torch.Tensor:
        return llama.apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]  # no keys

    return {
        "rms_norm": (lambda x: row_ops.rms_norm(x, norm.weight, EPS)[0], norm, [random(tokens, width)], 5),
        "rotate": (rotate, rotate_spelt_out, [queries], 4),
        "swiglu": (
            lambda gate, up: row_ops.gated_unit(gate, up, "silu"),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            [random(tokens, options.inner), random(tokens, options.inner)],
            8,
        ),
    }


def results(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def relative_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest of all tensors'."""
    pairs = [(a.flatten().float(), b.flatten().float()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def milliseconds(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> float:
    """Median of forward and backward, a call at a time."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.randn_like(function(*leaves))

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    if inputs[0].is_cuda:
        from triton.testing import do_bench

        return float(do_bench(both, warmup=10, rep=60, return_mode="median"))
    both()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        both()
        times.append(1e3 * (time.perf_counter() - started))
    return median(times)


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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (ours, rival, inputs, moved) in cases(options, device, dtype).items():
        difference = relative_difference(*(results(function, inputs) for function in (ours, rival)))
        times = [milliseconds(function, inputs, options.repeats) for function in (ours, rival)]
        n_bytes = moved * inputs[0].numel() * dtype.itemsize
        line = {
            "operation": name,
            "shape": list(inputs[0].shape),
            "dtype": str(dtype).removeprefix("torch."),
            "ms": float(f"{times[0]:.4g}"),
            "transformers_ms": float(f"{times[1]:.4g}"),
            "ratio": float(f"{times[1] / times[0]:.3g}"),
            "relative_difference": float(f"{difference:.2g}"),
            "gb_per_s": round(n_bytes / times[0] / 1e6, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
