"""Runs one work with upstream's llm2vec 0.2.3, like its own training scripts. It has its own venv."""

import json
import sys
import time
from pathlib import Path

import torch
from llm2vec import LLM2Vec
from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
from llm2vec.models import LlamaBiForMNTP
from peft import LoraConfig, get_peft_model

NAMES = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model, spec):
    config = LoraConfig(
        r=spec["lora_rank"],
        lora_alpha=spec["lora_alpha"],
        target_modules=NAMES,
        lora_dropout=0.0,
        bias="none",
    )
    return get_peft_model(model, config)


def recompute(model, spec):
    if spec["rival_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def mntp_step(spec):
    model = LlamaBiForMNTP.from_pretrained(spec["model"], attn_implementation="sdpa")
    model.set_model_for_peft(with_lora(model.get_model_for_peft(), spec))
    model.lm_head.requires_grad_(False)
    recompute(model.model, spec)
    longest = max(map(len, spec["input_ids"]))
    pad = [longest - len(ids) for ids in spec["input_ids"]]
    batch = {
        "input_ids": torch.tensor([ids + [0] * n for ids, n in zip(spec["input_ids"], pad, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * n for ids, n in zip(spec["input_ids"], pad, strict=True)]
        ),
        "labels": torch.tensor([labels + [-100] * n for labels, n in zip(spec["labels"], pad, strict=True)]),
    }
    return model, lambda: model(**batch, use_cache=False).loss


def contrastive_step(spec):
    wrapped = LLM2Vec.from_pretrained(
        spec["model"], attn_implementation="sdpa", max_length=spec["max_tokens"]
    )
    wrapped.model = with_lora(wrapped.model, spec)
    recompute(wrapped.model, spec)
    loss = HardNegativeNLLLoss(scale=spec["scale"])
    examples = spec["examples"] or [[text, text] for text in spec["texts"]]

    def step():
        columns = []
        for texts in zip(*examples, strict=True):
            prepared = [wrapped.prepare_for_tokenization(text) for text in texts]
            columns.append(wrapped(wrapped.tokenize([f"!@#$%^&*(){text}" for text in prepared])))
        return loss(*columns)

    return wrapped.model, step


def encode(spec):
    wrapped = LLM2Vec.from_pretrained(
        spec["model"], attn_implementation="sdpa", max_length=spec["max_tokens"]
    )
    wrapped.encode(spec["texts"][:8], batch_size=8, show_progress_bar=False)
    started = time.perf_counter()
    vectors = wrapped.encode(spec["texts"], batch_size=32, show_progress_bar=False)
    return {"seconds": [time.perf_counter() - started], "vectors": vectors[:200].tolist()}


def train(spec):
    model, loss_of = mntp_step(spec) if spec["work"] == "mntp" else contrastive_step(spec)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=spec["lr"])
    seconds, losses = [], []
    for _ in range(spec["n_steps"] + 1):
        started = time.perf_counter()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "loss": losses[0]}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    print(json.dumps(encode(given) if given["work"] == "encode" else train(given)))
