"""Times MNTP with LoRA in the shape of a 7B model on this GPU: tokens a second, and share of its matmul peak.

    python benchmarks/mntp_gpu.py

Weights are random bf16 in the shape of Llama-2-7B (or of `--layers`, `--width` …). Adapters of rank 16 and
dropout 0.05 are on all linear layers. Texts are packed and have one length. A fifth of the tokens is
masked. Forward, backward and AdamW are the product's own modules, without DeepSpeed. The peak is the best
bf16 product in the same process. There is one JSON line for each kind of recomputation. `--cpu` runs in
fp32, to check that the script works. Without an installation, set `PYTHONPATH=.:kernels`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
from device_peaks import matmul_peak_tflop_per_s, seconds_of
from speed.limit import needed_gflop

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder.encoder import trunk_hidden_states
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.attention import register
from llm2vec_ds.model.bidirectional import with_causal
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead
from llm2vec_ds.recipe.sections import AdapterConfig

MASK_RATE = 0.2


def packed_batch(vocab_size: int, n_texts: int, length: int) -> PackedBatch:
    random = np.random.default_rng(0)
    texts, labels = [], []
    for _ in range(n_texts):
        ids = random.integers(0, vocab_size, length)
        masked = random.random(length) < MASK_RATE
        masked[0] = False
        texts.append(TokenizedText(ids.tolist(), 0, length, 0))
        labels.append(np.where(masked, ids, -100))
    return pack(texts, labels)


def random_model(options: argparse.Namespace, device: torch.device) -> tuple[Any, MaskedTokenHead]:
    """Returns a trunk with trainable adapters and a head, with random weights in the shape of `options`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.float32 if options.cpu else torch.bfloat16
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=4096,
    )
    with device:
        model = AutoModelForCausalLM.from_config(
            with_causal(config, False),
            dtype=dtype,
            attn_implementation=register("auto"),
            trust_remote_code=False,
        )
    trunk, linear = model.base_model, model.get_output_embeddings()
    linear.requires_grad_(False)
    fuse_layers(trunk)
    head = MaskedTokenHead(linear, config, chunk_tokens=1024)
    add_lora(trunk, AdapterConfig(dropout=options.dropout))
    for parameter in trunk.parameters():  # like the engine's bf16
        parameter.data = parameter.data.to(dtype)
    return trunk.train(), head


def measure(options: argparse.Namespace, recomputation: str, peak: float) -> dict[str, Any]:
    device = torch.device("cpu" if options.cpu else "cuda")
    trunk, head = random_model(options, device)
    from llm2vec_ds.model.recomputation import recompute_activations  # here: peft's imports may print a line

    recompute_activations(trunk, recomputation)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in trunk.parameters() if p.requires_grad], lr=1e-4)
    batch = packed_batch(options.vocab, options.texts, options.length).to(device)
    assert batch.labels is not None
    masked_M = batch.predicted
    assert masked_M is not None

    def step() -> None:
        hidden_TD = trunk_hidden_states(trunk, batch)
        loss_M, _ = head(hidden_TD[masked_M - 1], batch.labels[masked_M])
        loss_M.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [seconds_of(step, device) for _ in range(options.steps)]
    gflop = needed_gflop("mntp", trunk.config.to_dict(), batch.n_tokens, len(masked_M))
    return {
        "activation_checkpointing": recomputation,
        "adapter_dropout": options.dropout,
        "tokens": batch.n_tokens,
        "length": options.length,
        "step_ms": round(median(seconds) * 1e3, 2),
        "step_ms_least_and_most": [round(f(seconds) * 1e3, 2) for f in (min, max)],
        "tokens_per_s": round(batch.n_tokens / median(seconds), 1),
        "tflop_per_s": round(gflop / median(seconds) / 1e3, 3),
        "matmul_peak_tflop_per_s": round(peak, 3),
        "share_of_peak": round(gflop / median(seconds) / 1e3 / peak, 3),
        "peak_gib": None if options.cpu else round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008, help="width of the feed-forward layers")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a text (default %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the adapters (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default %(default)s)")
    parser.add_argument("--recomputation", nargs="+", default=["selective", "none", "full"])
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("error: no CUDA device here: --cpu runs without one, for a small shape", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.cpu else "cuda")
    peak = matmul_peak_tflop_per_s(device, torch.float32 if options.cpu else torch.bfloat16)
    for recomputation in options.recomputation:
        print(json.dumps(measure(options, recomputation, peak)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
