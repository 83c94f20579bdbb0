"""Processor time of a step whose products cost nothing: what Python and its libraries take, ours and plain.

    OMP_NUM_THREADS=1 python benchmarks/host_overhead.py

The model is a Llama of 30 layers and width 64, with LoRA of rank 16 and dropout 0.05, on 64 tokens and one
thread. Times are medians. The parts:

  train    steps of `llm2vec-ds train`, MNTP, with each kind of activation checkpointing, without a DeepSpeed
           JSON and under ZeRO-2
  cached   the same with five cached micro-batches (the supervised stage)
  model    forward and backward alone: no engine, no optimizer
  encode   `Encoder.encode` of three texts

Beside each, transformers, peft and torch's AdamW do the same. Prints one JSON line; `ratio` is ours over
plain in processor time. On CUDA wall clock, the GPU's own time, launches and waits stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
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
"""`default`: the recipe says nothing."""
ENGINES = {"no_json": False, "zero2": True}
PASSES, TEXTS_PER_PASS = 5, 3
Cases = dict[str, dict[str, Any]]


class Bench:
    """A small model and its texts in `folder`, measured in one way after another."""

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

    def meter(self) -> StepMeter:
        return StepMeter(self.device, self.options.warm_up, self.options.steps)

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

    def train(self, zero2: bool) -> Cases:
        return {name: self.run("mntp", kind, zero2) for name, kind in CHECKPOINTING.items()}

    def run(self, stage: str, checkpointing: str | None, zero2: bool) -> dict[str, Any]:
        return ours.measured_run(self.recipe(stage, checkpointing, zero2), self.meter())

    def train_plain(self) -> Cases:
        batches = ours.masked_batches(self.recipe("mntp", "none", False), 2, self.device)
        return {
            name: plain.mntp_run(
                self.model, batches, self.device, fp32_adapters=self.fp32, recompute=name == "full"
            ).measured(self.meter())
            for name in ("none", "full")
        }

    def cached_plain(self) -> dict[str, Any]:
        run = plain.contrastive_run(self.model, self.examples, self.device, texts_per_pass=TEXTS_PER_PASS)
        return run.measured(self.meter())

    def model_alone(self) -> Cases:
        """Forward and backward of the product's model, as the objective runs it."""
        figures = {}
        for name, checkpointing in CHECKPOINTING.items():
            stage = ours.build_stage(self.recipe("mntp", checkpointing, False), self.device)
            packed, _ = stage.batches(0, stage.global_batch(0))
            batch, model = packed[0].to(self.device), stage.model.train()
            figures[name] = self.meter().measure(lambda m=model, b=batch: m(b)[0].mean().backward())
        return figures

    def plain_model_alone(self) -> Cases:
        (batch,) = ours.masked_batches(self.recipe("mntp", "none", False), 1, self.device)
        run = plain.mntp_run(self.model, [batch], self.device, fp32_adapters=self.fp32)
        return {"none": self.meter().measure(run.backward)}

    def encode(self) -> Cases:
        from llm2vec_ds import Encoder

        encoder = Encoder.from_pretrained(str(self.model), device=self.device)
        texts = self.short[:TEXTS_PER_PASS]
        theirs = plain.encoder_of(self.model, self.device)
        return {
            "ours": self.meter().measure(lambda: encoder.encode(texts)),
            "plain": self.meter().measure(lambda: theirs(texts)),
        }


def ratio(ours: dict[str, Any], plain: dict[str, Any]) -> float:
    return round(ours["processor_ms"] / plain["processor_ms"], 3)


def ratios(ours: Cases, base: Cases) -> dict[str, float]:
    """Over the plain one that keeps all it computes; `full` also over the one that recomputes."""
    made = {name: ratio(case, base["none"]) for name, case in ours.items()}
    return made | ({"full_over_full": ratio(ours["full"], base["full"])} if "full" in base else {})


def train_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    figures = {name: bench.train(ENGINES[name]) for name in engines}
    base = bench.train_plain()
    return {"ours": figures, "plain": base, "ratio": {n: ratios(f, base) for n, f in figures.items()}}


def cached_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    figures = {name: bench.run("supervised", "none", ENGINES[name]) for name in engines}
    base = bench.cached_plain()
    return {"ours": figures, "plain": base, "ratio": {n: ratio(f, base) for n, f in figures.items()}}


def model_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    figures, base = bench.model_alone(), bench.plain_model_alone()
    return {"ours": figures, "plain": base, "ratio": ratios(figures, base)}


def encode_part(bench: Bench, engines: list[str]) -> dict[str, Any]:
    figures = bench.encode()
    return {**figures, "ratio": ratio(figures["ours"], figures["plain"])}


PARTS = {"train": train_part, "cached": cached_part, "model": model_part, "encode": encode_part}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=15, help="timed ones (default %(default)s)")
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
