"""Runs one work with sentence-transformers: its model class and loss, peft's LoRA, a plain loop."""

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, losses, models


def load(spec):
    """Loads `model`, a folder whose config.json says `is_causal: false`."""
    trunk = models.Transformer(spec["model"], max_seq_length=spec["max_tokens"])
    trunk.tokenizer.pad_token = trunk.tokenizer.pad_token or trunk.tokenizer.eos_token
    pooling = models.Pooling(trunk.get_word_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[trunk, pooling], device="cpu")


def encode(spec):
    model = load(spec)
    model.encode(spec["texts"][:8], batch_size=8)
    started = time.perf_counter()
    vectors = model.encode(spec["texts"], batch_size=32)
    return {"seconds": [time.perf_counter() - started], "vectors": vectors[:200].tolist()}


def train(spec):
    model = load(spec)
    model.add_adapter(
        LoraConfig(
            r=spec["lora_rank"], lora_alpha=spec["lora_alpha"], target_modules="all-linear", lora_dropout=0.0
        )
    )
    if spec["rival_checkpointing"]:
        model[0].auto_model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of = losses.MultipleNegativesRankingLoss(model, scale=spec["scale"])
    examples = spec["examples"] or [[text, text] for text in spec["texts"]]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec["lr"])
    model.train()
    seconds, values = [], []
    for _ in range(spec["n_steps"] + 1):
        started = time.perf_counter()
        columns = [model.preprocess(list(texts)) for texts in zip(*examples, strict=True)]
        loss = loss_of(columns, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "loss": values[0]}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    print(json.dumps(encode(given) if given["work"] == "encode" else train(given)))
