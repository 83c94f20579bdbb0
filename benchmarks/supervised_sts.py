"""Tests whether the supervised stage improves an encoder, on STS-B pairs with mined hard negatives.

    python benchmarks/supervised_sts.py --model demo-output/encoder --train stsb_train.csv --dev stsb_dev.csv

Pairs of a training file (sentence1, sentence2, score) that score at least 4 are queries and positives.
`llm2vec-ds mine` finds their hard negatives among all its sentences. `llm2vec-ds train` does the rest. It
prints one JSON line with Spearman's correlation before and after. Never give a test set as --dev, because
settings are chosen on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.evaluate.sts import load_graded_pairs, sts_spearman

POSITIVE_SCORE = 4.0


def write_pairs(train: str, folder: Path) -> tuple[Path, Path]:
    """Writes the files of positives and of all sentences."""
    pairs = load_graded_pairs(train)
    positives, corpus = folder / "positives.jsonl", folder / "corpus.jsonl"
    rows = zip(pairs.first, pairs.second, pairs.scores, strict=True)
    good = [{"query": a, "positive": b} for a, b, score in rows if score >= POSITIVE_SCORE and a != b]
    positives.write_text("".join(json.dumps(row) + "\n" for row in good))
    texts = dict.fromkeys(pairs.first + pairs.second)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return positives, corpus


def recipe(arguments: argparse.Namespace, pairs: Path, output: Path) -> dict[str, Any]:
    return {
        "stage": "supervised",
        "model": {"path": arguments.model},
        "data": {"path": str(pairs), "max_tokens": 64},
        "output_dir": str(output),
        "overwrite": True,
        "max_steps": arguments.steps,
        "batch": {"global_batch_size": arguments.batch, "micro_batch_tokens": 8192},
        "optimizer": {"lr": arguments.lr, "warmup_steps": 10, "schedule": "linear"},
        "supervised": {"scale": arguments.scale},
    }


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "llm2vec_ds", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder folder to start from")
    parser.add_argument("--train", required=True, help="STS-B train: sentence1, sentence2, score")
    parser.add_argument("--dev", required=True, help="STS-B dev, in the same form")
    parser.add_argument("--output", default="runs/supervised_sts", help="folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--margin", type=float, default=0.1, help="of negatives below the positive's cosine")
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    positives, corpus = write_pairs(arguments.train, folder)
    mined = folder / "mined.jsonl"
    mined.unlink(missing_ok=True)
    mine = ["mine", "--model", arguments.model, "--pairs", str(positives), "--corpus", str(corpus)]
    command(*mine, "--output", str(mined), "--negatives", "1", "--margin", str(arguments.margin))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(arguments, mined, folder / "run")))
    command("train", str(path))
    dev = load_graded_pairs(arguments.dev)
    before = sts_spearman(Encoder.from_pretrained(arguments.model), dev)
    after = sts_spearman(Encoder.from_pretrained(folder / "run" / "encoder"), dev)
    names = ("steps", "batch", "lr", "scale", "margin")
    result = {
        "pairs": len(positives.read_text().splitlines()),
        "settings": {name: getattr(arguments, name) for name in names},
        "dev_spearman_before": round(before, 4),
        "dev_spearman_after": round(after, 4),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
