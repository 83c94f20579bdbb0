"""Measures the host memory of each rank while a model loads under ZeRO-3: in parts, and whole for comparison.

    python benchmarks/zero3_loading_memory.py --megabytes 400 --ranks 2

It writes a Llama of random weights in bf16 and several files, as LLMs are shipped. Then it loads the model
in fp32 in fresh gloo ranks on the CPU. It counts anonymous memory above what the process had before loading
(RssAnon of /proc/self/status, sampled every 5 ms). A mapped weight file is page cache, which all ranks
share and the system drops when it needs memory. The peak of resident memory (VmHWM) includes it and is
printed too. "after" is the memory that stays after loading. It prints one JSON line. Exit code 1 means that
a rank's peak exceeds its part plus TRANSIENT_TENSORS times the largest tensor.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from llm2vec_ds.distributed import ranks_from_environment
from llm2vec_ds.engine.deepspeed_engine import deepspeed_config, partition_for, start_process_group
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.recipe.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
WIDTH, VOCABULARY = 1024, 4_000  # no tensor exceeds 17 MB: 4 % of 400 MB (in a 7B Llama 2 %)
SAMPLE_EVERY_S = 0.005
TRANSIENT_TENSORS = 3
"""A tensor before it is cut up, and the buffers that send and receive it."""


def write_model(folder: Path, megabytes: int) -> tuple[float, float]:
    """Writes a Llama of about this many MB in fp32. Returns the MB of its trunk and of its largest tensor."""
    from transformers import LlamaConfig, LlamaModel

    layer_mb = 4 * (2 * WIDTH**2 + 2 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH) / 1e6
    n_layers = max(1, round((megabytes - 4 * VOCABULARY * WIDTH / 1e6) / layer_mb))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaModel(config)
    sizes_mb = [parameter.numel() * 4 / 1e6 for parameter in model.parameters()]
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    return sum(sizes_mb), max(sizes_mb)


def status_mb(name: str) -> float:
    """Returns a field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


class PeakAnonymous:
    """Records the peak of anonymous memory while the context lasts."""

    def __enter__(self) -> PeakAnonymous:
        self.peak_mb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self.peak_mb = max(self.peak_mb, status_mb("RssAnon"))

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()


def load(rank: int, ranks: int, folder: str, port: int, in_parts: bool, results: Any) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}})
    torch.set_num_threads(1)
    device = start_process_group(ranks_from_environment())
    values = {"stage": "mntp", "model": {"path": folder}, "data": {"path": "t.txt"}, "output_dir": "o"}
    recipe = parse_recipe({**values, "deepspeed": str(ROOT / "ds_configs" / "zero3.json")})
    partition = partition_for(deepspeed_config(recipe, ranks, torch.float32)) if in_parts else nullcontext
    load_trunk(warm_up(folder), TrunkOptions(device=device, partition=partition))
    torch.distributed.barrier()
    trim()
    before_mb, resident_before_mb = status_mb("RssAnon"), status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    started = time.perf_counter()
    with PeakAnonymous() as anonymous:
        trunk = load_trunk(folder, TrunkOptions(device=device, partition=partition))
    elapsed_s = time.perf_counter() - started
    resident_peak_mb = status_mb("VmHWM") - resident_before_mb
    trim()  # while `trunk` is alive
    results[rank] = {
        "peak_mb": round(anonymous.peak_mb - before_mb),
        "after_mb": round(status_mb("RssAnon") - before_mb),
        "resident_peak_mb": round(resident_peak_mb),
        "elapsed_s": round(elapsed_s, 1),
    }
    del trunk


def warm_up(folder: str) -> str:
    """Loads a tiny model of the same type, so that the baseline includes imports and pools."""
    return f"{folder}-tiny"


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measured(folder: Path, ranks: int, in_parts: bool) -> list[dict[str, float]]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(load, args=(ranks, str(folder), port, in_parts, results), nprocs=ranks)
        return [results[rank] for rank in range(ranks)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400, help="about this size in fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where the model goes meanwhile (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zero3-loading-", dir=options.folder) as place:
        folder = Path(place) / "model"
        model_mb, largest_mb = write_model(folder, options.megabytes)
        write_tiny(folder)
        whole = measured(folder, options.ranks, in_parts=False)
        parts = measured(folder, options.ranks, in_parts=True)
    allowed_mb = model_mb / options.ranks + TRANSIENT_TENSORS * largest_mb
    passed = max(rank["peak_mb"] for rank in parts) <= allowed_mb
    result = {
        "benchmark": "zero3_loading_memory",
        "passed": passed,
        "model_mb": round(model_mb),
        "largest_tensor_mb": round(largest_mb),
        "ranks": options.ranks,
        "in_parts": parts,
        "whole": whole,
        "allowed_peak_mb": round(allowed_mb),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "deepspeed", "safetensors")},
    }
    print(json.dumps(result))
    return 0 if passed else 1


def write_tiny(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaModel(config).save_pretrained(warm_up(str(folder)))


if __name__ == "__main__":
    sys.exit(main())
