"""Compares the attention kernels' output and gradients on this GPU with double precision.

    python benchmarks/kernel_checks.py --texts long

It prints one JSON line a check. Its exit code is 1 if an error is more than twice that of naive PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
from llm2vec_kernels.attention import AttentionOptions, reference
from llm2vec_kernels.attention.triton import flash_attention

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


def check(lengths: tuple[int, ...], device: str) -> Iterator[dict[str, Any]]:
    """Runs all `CHECKS`. The first of a kind compiles its kernels."""
    for dtype, heads, kv_heads, head_dim, options in CHECKS:
        started = time.monotonic()
        errors, naive = errors_against_reference(device, lengths, dtype, heads, kv_heads, head_dim, options)
        yield {
            "check": f"{dtype}, {heads}/{kv_heads} heads, head dim {head_dim}, {options}",
            "error_out_dq_dk_dv": errors,
            "naive_error": naive,
            "seconds": round(time.monotonic() - started, 1),
            "ok": all(a <= 2 * b + 1e-6 for a, b in zip(errors, naive, strict=True)),
        }


def errors_against_reference(
    device: str,
    lengths: tuple[int, ...],
    dtype_name: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    options: dict[str, Any],
) -> tuple[list[float], list[float]]:
    """Returns the largest errors of output, dq, dk, dv against double precision: ours and naive PyTorch's."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    dtype = getattr(torch, dtype_name)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    attention_options = AttentionOptions(head_dim**-0.5, **options)

    def ours(*qkv: Any) -> Any:
        return flash_attention(*qkv, cu_seqlens, max(lengths), attention_options)

    def plain(*qkv: Any) -> Any:
        return reference.attention(*qkv, cu_seqlens, attention_options)

    def results(function: Any, dtype: Any) -> list[Any]:
        *leaves, weight = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    exact = results(plain, torch.float64)

    def errors(computed: list[Any]) -> list[float]:
        return [float((x.double() - t).abs().max()) for x, t in zip(computed, exact, strict=True)]

    return errors(results(ours, dtype)), errors(results(plain, dtype))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", choices=LENGTHS, default="long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here: tests/kernels checks the same without one", file=sys.stderr)
        return 2
    failed = 0
    for line in check(LENGTHS[options.texts], "cuda"):
        print(json.dumps({**line, "texts": options.texts}), flush=True)
        failed += not line["ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
