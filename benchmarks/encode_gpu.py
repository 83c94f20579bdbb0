"""Times `Encoder.encode` and `SentenceTransformer.encode` on this GPU, in bf16 with the same weights.

    python benchmarks/encode_gpu.py

The model has the shape of SmolLM2-135M, random weights and no head. Texts are sentences of STS-B's lengths
and paragraphs of WikiText's. The rival uses sdpa, its best attention without another package, and the best
of the given batch sizes. It prints one JSON line a case, with texts a second and the least cosine between
both tools' vectors. `--cpu` runs in fp32, to check that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from length_mixes import drawn_lengths, text_of
from steps.random_model import write_tokenizer
from train_gpu import SHAPE

TEXTS = {"sts": 4096, "wiki": 1024}
Encode = Callable[[list[str]], Any]


def write_trunk(folder: Path, config_file: str, dtype: torch.dtype) -> int:
    """Writes random weights without a language head. Returns the number of token ids."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(config_file, trust_remote_code=False)
    config.is_causal = False
    torch.manual_seed(0)
    AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return int(config.vocab_size)


def contenders(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Encode]]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as modules

    from llm2vec_ds import Encoder

    device = "cpu" if options.cpu else "cuda"
    encoder = Encoder.from_pretrained(str(folder), device=device)
    for tokens in options.micro_batch_tokens:
        yield (
            f"ours, micro_batch_tokens {tokens}",
            lambda texts, n=tokens: encoder.encode(texts, micro_batch_tokens=n),
        )
    dtype = torch.float32 if options.cpu else torch.bfloat16
    trunk = modules.Transformer(str(folder), model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"})
    trunk.max_seq_length = encoder.settings.max_tokens
    pooling = modules.Pooling(trunk.get_word_embedding_dimension(), pooling_mode="mean")
    rival = SentenceTransformer(modules=[trunk, pooling], device=device)
    for size in options.batch_sizes:
        yield (
            f"sentence-transformers, batch_size {size}",
            lambda texts, n=size: rival.encode(texts, batch_size=n, show_progress_bar=False),
        )


def seconds(encode: Encode, texts: list[str], rounds: int) -> tuple[list[float], np.ndarray]:
    vectors = encode(texts)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        encode(texts)  # vectors end on the host, so nothing is left to wait for
        times.append(time.perf_counter() - started)
    return times, np.asarray(vectors, dtype=np.float32)


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return round(float(cosine.min()), 5)


def measure(folder: Path, vocab: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    mixes = {
        mix: [text_of(length, vocab, draw) for length in drawn_lengths(mix, n // options.divide)]
        for mix, n in TEXTS.items()
    }
    first: dict[str, np.ndarray] = {}
    for name, encode in contenders(folder, options):
        for mix, texts in mixes.items():
            times, vectors = seconds(encode, texts, options.rounds)
            n_tokens = sum(text.count(" ") + 1 for text in texts)
            yield {
                "benchmark": "encode",
                "texts": mix,
                "case": name,
                "n_texts": len(texts),
                "n_tokens": n_tokens,
                "seconds": round(median(times), 4),
                "texts_per_s": round(len(texts) / median(times), 1),
                "tokens_per_s": round(n_tokens / median(times), 1),
                "least_cosine": least_cosine(first.setdefault(mix, vectors), vectors),
            }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default=str(SHAPE), help="config.json of the shape (default: SmolLM2-135M)"
    )
    parser.add_argument("--micro-batch-tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds after one untimed round")
    parser.add_argument("--divide", type=int, default=1, help="divides the number of texts")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("error: no CUDA device here: --cpu runs without one, for a small shape", file=sys.stderr)
        return 2
    machine = {
        "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("LLM2VEC_DS_CACHE", name)
        dtype = torch.float32 if options.cpu else torch.bfloat16
        vocab = write_trunk(Path(name), options.config, dtype)
        for line in measure(Path(name), vocab, options):
            print(json.dumps({**line, **machine}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
