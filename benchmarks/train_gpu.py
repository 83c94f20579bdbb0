"""Times steps of `llm2vec-ds train` and of plain transformers and peft on this GPU.

    python benchmarks/train_gpu.py mntp --tokens 16384

  mntp        the batch of recipes/smollm2_135m/mntp.yaml: 32 texts, `--tokens` in all; without activation
              checkpointing, with the default, and without CUDA graphs. Plain pads, its adapters in fp32 and
              in bf16
  simcse      the batch of simcse.yaml: 128 sentences
  cached      the supervised stage with five cached micro-batches of 64 tokens
  supervised  the supervised stage with 64 × 3 texts of 8 to 300 tokens, cached and in one pass

The shape is that of SmolLM2-135M. Weights are random and texts are generated, because speed depends on
neither. There is one JSON line a case: wall clock, processor and GPU time a step, real tokens a second,
launches and waits for the device (torch's profiler counts both), and the first losses. If nothing is random
in the first loss, ours and the plain one must agree: `ok` says whether they do. If not, the exit code is 1.
`--cpu` runs in fp32, to check that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from length_mixes import drawn_lengths, scaled, text_of
from steps import ours, plain
from steps.meter import StepMeter
from steps.random_model import write_model

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ROOT / "recipes" / "smollm2_135m" / "config.json"
OURS = {
    "none": {"activation_checkpointing": "none"},
    "default": {},
    "default_eager": {"cuda_graphs": "off"},
}
"""The recipes' model settings: no recomputation, the defaults, and the defaults without CUDA graphs."""
TEXTS, SENTENCES, EXAMPLES = 32, 128, 64
Case = tuple[str, Callable[[], dict[str, Any]]]


class Bench:
    """A model of the shape in `options`, and its runs. Files go into `folder`."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoConfig

        self.options, self.folder = options, folder
        self.device = torch.device("cpu" if options.cpu else "cuda")
        config = AutoConfig.from_pretrained(options.config, trust_remote_code=False)
        self.vocab = config.vocab_size
        self.model = write_model(folder / "model", config, torch.float32 if options.cpu else torch.bfloat16)

    def meter(self) -> StepMeter:
        options = self.options
        return StepMeter(self.device, options.warm_up, options.steps, options.profiled)

    def texts(self, lengths: list[int]) -> list[str]:
        draw = random.Random(0)
        return [text_of(length, self.vocab, draw) for length in lengths]

    def write_texts(self, texts: list[str]) -> Path:
        path = self.folder / "texts.txt"
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    def write_triplets(self, texts: list[str]) -> Path:
        path, names = self.folder / "triplets.jsonl", ("query", "positive", "negative")
        rows = [dict(zip(names, example, strict=True)) for example in by_threes(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def recipe(self, stage: str, texts: Path, size: int, micro_batch: int, **sections: Any) -> Any:
        values = {
            "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
            "batch": {"global_batch_size": size, "micro_batch_tokens": micro_batch},
            **sections,
        }
        return ours.recipe_of(stage, self.model, texts, self.folder, values)

    def ours(self, recipe: Any) -> dict[str, Any]:
        return ours.measured_run(recipe, self.meter())

    def plain(self, examples: list[list[str]], **options: Any) -> dict[str, Any]:
        run = plain.contrastive_run(self.model, examples, self.device, **options)
        return run.measured(self.meter())


def by_threes(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + 3] for i in range(0, len(texts), 3)]


def mntp(bench: Bench) -> Iterator[Case]:
    tokens = bench.options.tokens
    drawn = drawn_lengths("wiki", TEXTS) if tokens < TEXTS * 512 else [512] * TEXTS
    data = bench.write_texts(bench.texts(scaled(drawn, tokens, 512)))
    recipes = {
        name: bench.recipe("mntp", data, TEXTS, max(tokens, 512), model=model) for name, model in OURS.items()
    }
    for name, recipe in recipes.items():
        yield name, lambda recipe=recipe: bench.ours(recipe)
    for adapters in ("fp32", "bf16"):

        def run(fp32: bool = adapters == "fp32") -> dict[str, Any]:
            batches = ours.masked_batches(recipes["none"], 3, bench.device)
            loop = plain.mntp_run(bench.model, batches, bench.device, fp32_adapters=fp32)
            return {**loop.measured(bench.meter()), "tokens": tokens}

        yield f"plain_{adapters}", run


def simcse(bench: Bench) -> Iterator[Case]:
    texts = bench.texts(drawn_lengths("sts", SENTENCES))
    data = bench.write_texts(texts)
    for name, model in OURS.items():
        recipe = bench.recipe("simcse", data, SENTENCES, 32768, model=model)
        yield name, lambda recipe=recipe: bench.ours(recipe)
    twice = [[text, text] for text in texts]
    yield "plain", lambda: bench.plain(twice, scale=20.0, attention_dropout=0.3)


def cached(bench: Bench) -> Iterator[Case]:
    texts = bench.texts([21] * 15)
    data = bench.write_triplets(texts)
    for name in ("default", "default_eager"):
        recipe = bench.recipe("supervised", data, 5, 64, data={"max_tokens": 64}, model=OURS[name])
        yield name, lambda recipe=recipe: bench.ours(recipe)
    yield "plain", lambda: bench.plain(by_threes(texts), texts_per_pass=3)


def supervised(bench: Bench) -> Iterator[Case]:
    texts = bench.texts(drawn_lengths("triplets", 3 * EXAMPLES))
    data = bench.write_triplets(texts)
    for name, micro_batch in {"default_cached": 4096, "default_direct": 2**20}.items():
        recipe = bench.recipe("supervised", data, EXAMPLES, micro_batch)
        yield name, lambda recipe=recipe: bench.ours(recipe)
    yield "plain_direct", lambda: bench.plain(by_threes(texts))


SAME_LOSS = ("mntp", "cached", "supervised")
"""Cases whose first losses must agree. Adapters start at zero, so nothing in these is random. SimCSE drops
attention weights."""
LOSS_TOLERANCE = 0.02
WORKS = {"mntp": mntp, "simcse": simcse, "cached": cached, "supervised": supervised}


def with_speed(figures: dict[str, Any]) -> dict[str, Any]:
    """Adds real tokens a second. Padding of the plain code does not count."""
    if "tokens" not in figures:
        return figures
    return {**figures, "tokens_per_s": round(figures["tokens"] / figures["wall_ms"] * 1e3, 1)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--tokens", type=int, default=4670, help="of an MNTP step (default %(default)s)")
    parser.add_argument(
        "--config", default=str(SHAPE), help="config.json of the shape (default: SmolLM2-135M)"
    )
    parser.add_argument("--cases", nargs="+", help="run only these: none, default, plain_bf16 …")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps (default %(default)s)")
    parser.add_argument(
        "--profiled", type=int, default=1, help="steps under the profiler (default %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if not options.cpu and not torch.cuda.is_available():
        print("error: no CUDA device here: --cpu runs without one, for a small shape", file=sys.stderr)
        return 2
    machine = {
        "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LLM2VEC_DS_CACHE", folder)
        bench, losses, all_agree = Bench(options, Path(folder)), list[float](), True
        for name, run in WORKS[options.work](bench):
            if options.cases and name not in options.cases:
                continue
            started = time.perf_counter()
            line = {"benchmark": "train", "work": options.work, "case": name, **with_speed(run())}
            line["case_seconds"] = round(time.perf_counter() - started, 1)
            if options.work in SAME_LOSS:
                losses.append(line["first_losses"][0])
                ok = max(losses) <= (1 + LOSS_TOLERANCE) * min(losses)
                line |= {"check": f"first loss of {name}", "ok": ok}
                all_agree &= ok
            print(json.dumps({**line, **machine}), flush=True)
            gc.collect()  # engine and model refer to each other
            if not options.cpu:
                torch.cuda.empty_cache()
    if not all_agree:
        print(f"error: the first losses {losses} differ: the work was not the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
