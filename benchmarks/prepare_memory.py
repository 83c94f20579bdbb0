"""Checks that `llm2vec-ds prepare` on a large file stays within 1 GiB and can be killed and resumed.

    python benchmarks/prepare_memory.py --model "$(llm2vec-ds demo --print-model-dir)" --megabytes 2000

It makes a text file of seeded random English words and prepares it with the model's tokenizer. The first
run is killed with SIGKILL when half of the lines are done, and started anew. The second one is not
interrupted. Both manifests must be equal. It prints one JSON line. Exit code 1 means that memory or
equality failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LIMIT_MIB = 1024
LINES_PER_WRITE = 20_000


def make_text(path: Path, megabytes: int, seed: int) -> int:
    """Writes lines of 5 to 80 words of Python's help topics, Zipf-distributed. Returns their number."""
    from pydoc_data.topics import topics

    random = np.random.default_rng(seed)
    vocabulary = np.array(sorted({word for topic in topics.values() for word in topic.split()}), dtype=object)
    random.shuffle(vocabulary)
    n_lines = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 10**6:
            lengths = random.integers(5, 81, LINES_PER_WRITE)
            picks = random.zipf(1.1, lengths.sum()) % len(vocabulary)
            for words in np.split(vocabulary[picks], np.cumsum(lengths)[:-1]):
                file.write(" ".join(words) + "\n")
            n_lines += LINES_PER_WRITE
    return n_lines


def write_recipe(folder: Path, model: str, text: Path) -> Path:
    path = folder / "recipe.yaml"
    recipe = {
        "stage": "mntp",
        "model": {"path": model},
        "data": {"path": str(text), "max_tokens": 128, "long_texts": "truncate"},
        "output_dir": str(folder / "run"),
    }
    path.write_text(json.dumps(recipe))
    return path


def prepare(recipe: Path, output: Path, kill_at_line: int | None = None) -> dict[str, Any]:
    """Runs the command and kills it after `kill_at_line` lines. Returns time and peak memory."""
    command = [sys.executable, "-m", "llm2vec_ds", "prepare", str(recipe), f"data.prepared_dir={output}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if kill_at_line is not None and lines_done(output) >= kill_at_line:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "elapsed_s": round(time.perf_counter() - started, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "exit_code": process.returncode,
    }


def lines_done(output: Path) -> int:
    for note in output.glob(".*.unfinished/progress.json"):
        return int(json.loads(note.read_text())["n_texts_read"])
    return 0


def manifest(output: Path) -> dict[str, Any]:
    (path,) = output.glob("*/manifest.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the model with the tokenizer")
    parser.add_argument("--megabytes", type=int, default=2000, help="at least 200: parts hold 64 MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where files go meanwhile (default: a temporary one)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-memory-", dir=options.folder))
    try:
        text = folder / "text.txt"
        n_lines = make_text(text, options.megabytes, options.seed)
        megabytes = text.stat().st_size / 10**6
        recipe = write_recipe(folder, options.model, text)
        killed = prepare(recipe, folder / "resumed", kill_at_line=n_lines // 2)
        half_there = list((folder / "resumed").glob("*/manifest.json"))
        resumed = prepare(recipe, folder / "resumed")
        print(json.dumps({"killed": killed, "resumed": resumed}), file=sys.stderr)
        whole = prepare(recipe, folder / "whole")
        equal = manifest(folder / "whole") == manifest(folder / "resumed")
        counts = manifest(folder / "whole")["counts"]
    finally:
        shutil.rmtree(folder)
    peaks_mib = [run["peak_mib"] for run in (whole, killed, resumed)]
    passed = equal and not half_there and killed["exit_code"] == -9 and max(peaks_mib) <= LIMIT_MIB
    result = {
        "benchmark": "prepare_memory",
        "megabytes": round(megabytes),
        "passed": passed,
        "manifests_equal": equal,
        "whole": whole,
        "killed": killed,
        "resumed": resumed,
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "tokens_per_s": round(counts["tokens"] / whole["elapsed_s"]),
        "resident_limit_mib": LIMIT_MIB,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tokenizers", "transformers", "datasets", "pyarrow")},
    }
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
