"""Measures the peak memory of a contrastive step for several numbers of texts in its global batch.

    python benchmarks/global_batch_memory.py --model "$(llm2vec-ds demo --print-model-dir)"

It runs SimCSE with LoRA, one step a size, with the same token budget of a micro-batch. With the embedding
cache, only the memory of the vectors may grow with the batch. Each size runs in its own process and gives
one JSON line. Each text is encoded twice, so there are twice as many vectors as texts.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml


def write_texts(path: Path, n_texts: int) -> None:
    """Writes pieces of 3 to 6 words of Python's help topics."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    starts = range(0, len(words) - 16, max((len(words) - 16) // n_texts, 1))
    lines = [" ".join(words[s : s + 3 + i % 4]) for i, s in enumerate(starts)][:n_texts]
    path.write_text("\n".join(lines) + "\n")


def measure(model: str, folder: Path, n_texts: int, max_tokens: int) -> dict[str, float]:
    """Returns the metrics of one step."""
    recipe = {
        "stage": "simcse",
        "model": {"path": model},
        "data": {"path": str(folder / "texts.txt"), "max_tokens": 64},
        "output_dir": str(folder / f"run-{n_texts}"),
        "max_steps": 1,
        "batch": {"global_batch_size": n_texts, "micro_batch_tokens": max_tokens},
        "simcse": {"attention_dropout": 0.1},
    }
    path = folder / f"{n_texts}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, "-m", "llm2vec_ds", "train", str(path)], check=True)
    (row,) = map(json.loads, (folder / f"run-{n_texts}" / "metrics.jsonl").read_text().splitlines())
    return {name: row[name] for name in ("loss", "n_tokens", "step_ms", "peak_mib")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 512, 4096], help="in a global batch")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a micro-batch (default %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.txt", max(arguments.texts))
        for n_texts in arguments.texts:
            measured = measure(arguments.model, folder, n_texts, arguments.max_tokens)
            versions = {package: version(package) for package in ("torch", "transformers", "deepspeed")}
            result = {"texts": n_texts, **measured, "machine": platform.machine(), "versions": versions}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
