"""Times attention forward, backward and both on a GPU, ours and its rivals. Prints one JSON line a case.

See `python benchmarks/attention.py --help`. A line gives `ms` and `tflops` of each contender on real
tokens; padding does not count. `ratio_to_best_rival` is the best rival's time over ours: above 1, ours is
faster. `auto` is the backend that the product would choose. `best_of_torch_to_auto` is the time of the best
that torch offers over the time of `auto`. A contender that refuses or fails is listed under `refused` with
its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from length_mixes import MIXES, length_mix

BACKWARD_FLOPS = 2.5  # times forward's: five matrix products instead of two


def milliseconds(function: Callable[[], Any], device: torch.device, leaves: list[torch.Tensor]) -> float:
    """Returns the median time of a call. On a GPU the caches are cleared between calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=10, rep=60, grad_to_none=leaves, return_mode="median"))
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def time_passes(contender: Any, device: torch.device) -> dict[str, float]:
    """Returns the milliseconds of forward, backward and both."""
    out = contender.run()
    gradient = torch.randn_like(out)
    passes: dict[str, Callable[[], Any]] = {
        "forward": contender.run,
        "backward": lambda: out.backward(gradient, retain_graph=True),
        "both": lambda: contender.run().backward(gradient),
    }
    return {name: milliseconds(function, device, contender.leaves) for name, function in passes.items()}


def measure(problem: Any, with_flex: bool) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Returns milliseconds by contender and pass, refusals, and untimed preparation."""
    from attention_rivals import contenders

    times: dict[str, dict[str, float]] = {}
    notes: dict[str, Any] = {"refused": {}, "setup_ms": {}}
    for name, make in contenders(problem, with_flex):
        try:
            contender = make()
            times[name] = time_passes(contender, problem.device)
        except Exception as error:  # a failure is a result, of a rival and of ours
            notes["refused"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if contender.setup_ms:
            notes["setup_ms"][name] = round(contender.setup_ms, 3)
        del contender
    return times, notes


def report(case: dict[str, Any], problem: Any, with_flex: bool) -> Iterator[dict[str, Any]]:
    """Returns one line for each pass."""
    from attention_rivals import OURS, chosen_by_auto

    times, notes = measure(problem, with_flex)
    auto = chosen_by_auto(problem)
    flops = {"forward": 1.0, "backward": BACKWARD_FLOPS, "both": 1 + BACKWARD_FLOPS}
    for name, factor in flops.items():
        ms = {contender: by_pass[name] for contender, by_pass in times.items()}
        rivals = [value for contender, value in ms.items() if contender != "triton"]
        ratio = round(min(rivals) / ms["triton"], 3) if rivals and "triton" in ms else None
        best = min((value for contender, value in ms.items() if contender not in OURS), default=None)
        notes |= {
            "auto": auto,
            "best_of_torch_to_auto": round(best / ms[auto], 3) if best and auto in ms else None,
        }
        tflops = {c: round(problem.forward_flops * factor / value / 1e9, 2) for c, value in ms.items()}
        rounded = {c: round(value, 4) for c, value in ms.items()}
        yield {**case, "pass": name, "ms": rounded, "tflops": tflops, "ratio_to_best_rival": ratio, **notes}


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], tuple[int, ...], bool]]:
    """Yields (name, lengths, whether FlexAttention runs): the mixes first, then dense texts."""
    for head_dim in options.head_dims:
        for mix in options.mixes:
            lengths = length_mix(mix, options.tokens)
            yield {"case": mix, "head_dim": head_dim, "dropout_p": 0.0}, lengths, options.flex != "none"
    for mix in options.mixes[:1]:
        case = {"case": mix, "head_dim": options.head_dims[0], "dropout_p": 0.3}
        yield case, length_mix(mix, options.tokens), False
    for length in options.lengths:
        for head_dim in options.head_dims:
            n_texts = max(1, options.tokens // length)
            case = {"case": "dense", "length": length, "head_dim": head_dim, "dropout_p": 0.0}
            yield case, (length,) * n_texts, options.flex == "all"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a stream")
    parser.add_argument("--width", type=int, default=2048, help="query heads × head dim")
    parser.add_argument("--group", type=int, default=1, help="query heads that share a key/value head")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--mixes", nargs="*", choices=MIXES, default=list(MIXES))
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--flex", choices=["none", "mixes", "all"], default="mixes", help="it compiles slowly"
    )
    parser.add_argument("--deadline-s", type=float, default=float("inf"), help="start no case after this")
    parser.add_argument(
        "--smoke", action="store_true", help="one tiny case on the CPU, interpreted: no figure"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        tiny = {"tokens": 48, "width": 32, "head_dims": [16], "mixes": ["sts"], "lengths": [24]}
        vars(options).update(tiny, flex="none")
    elif not torch.cuda.is_available():
        parser.exit(
            2, "error: the attention benchmark needs a CUDA device (--smoke runs one tiny case on a CPU)\n"
        )
    return options


def main() -> None:
    options = parse()
    from attention_rivals import Problem

    device = torch.device("cpu" if options.smoke else "cuda")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    started = time.perf_counter()
    for case, lengths, with_flex in cases(options):
        if time.perf_counter() - started > options.deadline_s:
            print(json.dumps({**case, "skipped": "deadline"}), flush=True)
            continue
        heads = max(1, options.width // case["head_dim"])
        kv_heads = max(1, heads // options.group)
        problem = Problem(lengths, heads, kv_heads, case["head_dim"], case["dropout_p"], device, dtype)
        shape = {"texts": len(lengths), "tokens": sum(lengths), "heads": heads, "kv_heads": kv_heads}
        for line in report({**case, **shape}, problem, with_flex):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
