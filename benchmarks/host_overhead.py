"""Measures the processor time of Python and its libraries in a step whose products cost nothing.

    OMP_NUM_THREADS=1 python benchmarks/host_overhead.py

The model is a Llama of 30 layers and width 64, with LoRA of rank 16 and dropout 0.05, on 64 tokens and one
thread. Times are medians. These are the parts:

  train    steps of `llm2vec-ds train`, MNTP, with each kind of activation checkpointing, without a DeepSpeed
           JSON and under ZeRO-2
  cached   the same with five cached micro-batches (the supervised stage)
  model    forward and backward alone: no engine, no optimizer
  encode   `Encoder.encode` of three texts

In turn with each step of ours, transformers, peft and torch's AdamW do the same. This is "plain". The script
prints one JSON line. `ratio` is ours over plain in processor time. On CUDA the line also has wall clock, the
GPU's own time, launches and waits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from length_mixes import text_of
from steps import ours, plain
from steps.meter import StepMeter
from steps.random_model import small_config, write_model

ZERO2 = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"
CHECKPOINTING = {"none": "none", "default": None, "full": "full"}
"""`default`: the recipe does not set it."""
ENGINES = {"no_json": False, "zero2": True}
PASSES, TEXTS_PER_PASS = 5, 3
Figures = dict[str, Any]
Rivals = dict[str, Callable[[], Any]]


class Bench:
    """A small model and its texts in `folder`. Each method measures one part."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = small_config(options.layers, options.width, options.vocab)
        self.fp32 = self.device.type != "cuda"
        dtype = torch.float32 if self.fp32 else torch.bfloat16
        self.model = write_model(folder / "model", config, dtype)
        draw = random.Random(0)
        self.text = text_of(options.tokens, options.vocab, draw)
        self.short = [text_of(options.tokens // TEXTS_PER_PASS, options.vocab, draw) for _ in range(15)]
        (folder / "text.txt").write_text(self.text + "\n")
        self.examples = [self.short[i::PASSES] for i in range(PASSES)]
        names = ("query", "positive", "negative")
        triplets = [dict(zip(names, example, strict=True)) for example in self.examples]
        (folder / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triplets))

    def measured(self, rivals: Rivals, run: Callable[[StepMeter], Figures]) -> dict[str, Figures]:
        """Measures `ours` and each rival. Their steps take turns."""
        options = self.options
        meters = {name: StepMeter(self.device, options.warm_up, options.steps) for name in rivals}

        def turns() -> None:
            for name, step in rivals.items():
                meters[name].alone(step)

        ours = run(StepMeter(self.device, options.warm_up, options.steps, between=turns))
        return {"ours": ours, **{name: meter.figures() for name, meter in meters.items()}}

    def recipe(self, stage: str, checkpointing: str | None, zero2: bool) -> Any:
        cached = stage == "supervised"
        size = PASSES if cached else 1
        values: dict[str, Any] = {
            "deepspeed": str(ZERO2) if zero2 else None,
            "data": {"max_tokens": self.options.tokens},
            "batch": {"global_batch_size": size, "micro_batch_tokens": self.options.tokens},
        }
        if checkpointing is not None:
            values["model"] = {"activation_checkpointing": checkpointing}
        data = self.folder / ("triplets.jsonl" if cached else "text.txt")
        return ours.recipe_of(stage, self.model, data, self.folder, values)

    def run(self, stage: str, checkpointing: str | None, zero2: bool, rivals: Rivals) -> dict[str, Figures]:
        recipe = self.recipe(stage, checkpointing, zero2)
        return self.measured(rivals, lambda meter: ours.measured_run(recipe, meter))

    def plain_mntp(self, recompute: bool = False) -> plain.PlainRun:
        batches = ours.masked_batches(self.recipe("mntp", "none", False), 2, self.device)
        return plain.mntp_run(self.model, batches, self.device, fp32_adapters=self.fp32, recompute=recompute)

    def plain_cached(self) -> plain.PlainRun:
        return plain.contrastive_run(self.model, self.examples, self.device, texts_per_pass=TEXTS_PER_PASS)

    def pass_of(self, checkpointing: str | None) -> Callable[[], Any]:
        """Returns forward and backward of the product's model, as the objective runs it."""
        stage = ours.build_stage(self.recipe("mntp", checkpointing, False), self.device)
        packed, _ = stage.batches(0, stage.global_batch(0))
        batch, model = packed[0].to(self.device), stage.model.train()
        return lambda: model(batch)[0].mean().backward()


def with_ratios(figures: dict[str, Figures]) -> dict[str, Any]:
    """Adds the processor time of ours over each rival's."""
    own = figures["ours"]["processor_ms"]
    ratios = {name: round(own / figures[name]["processor_ms"], 3) for name in figures if name != "ours"}
    return {**figures, "ratio": ratios}


def train_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    """Measures `train`. `plain` keeps all that it computes. Our `full` also has a rival that recomputes."""
    found: dict[str, Any] = {}
    for engine in engines:
        found[engine] = {}
        for name, checkpointing in CHECKPOINTING.items():
            rivals = {"plain": bench.plain_mntp().step}
            if name == "full":
                rivals["plain_full"] = bench.plain_mntp(recompute=True).step
            found[engine][name] = with_ratios(bench.run("mntp", checkpointing, ENGINES[engine], rivals))
    return found


def cached_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    return {
        engine: with_ratios(
            bench.run("supervised", "none", ENGINES[engine], {"plain": bench.plain_cached().step})
        )
        for engine in engines
    }


def model_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    found = {}
    for name, checkpointing in CHECKPOINTING.items():
        rivals, own = {"plain": bench.plain_mntp().backward}, bench.pass_of(checkpointing)
        found[name] = with_ratios(bench.measured(rivals, lambda meter, own=own: meter.measure(own)))
    return found


def encode_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    from llm2vec_ds import Encoder

    encoder = Encoder.from_pretrained(str(bench.model), device=bench.device)
    theirs, texts = plain.encoder_of(bench.model, bench.device), bench.short[:TEXTS_PER_PASS]
    rivals = {"plain": lambda: theirs(texts)}
    return with_ratios(bench.measured(rivals, lambda meter: meter.measure(lambda: encoder.encode(texts))))


PARTS = {"train": train_part, "cached": cached_part, "model": model_part, "encode": encode_part}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=15, help="timed steps (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LLM2VEC_DS_CACHE", folder)
        bench = Bench(options, Path(folder))
        shape = {name: getattr(options, name) for name in ("layers", "width", "tokens", "vocab", "steps")}
        line = {"benchmark": "host_overhead", **shape}
        line |= {part: PARTS[part](bench, options.engines) for part in options.parts}
    line["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    line["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
