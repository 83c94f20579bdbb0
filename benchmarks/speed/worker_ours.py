"""Runs one work with LLM2Vec-DS: a user's run, timed by its own metrics, or `Encoder.encode`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds import Encoder
from llm2vec_ds.engine.run import train as run
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe


def recipe_of(spec: dict[str, Any], folder: Path) -> Recipe:
    """Returns the recipe, and writes its data."""
    work = spec["work"]
    values: dict[str, Any] = {
        "stage": work,
        # Recompute if the rival recomputes, so that both trade speed for memory in the same way.
        "model": {
            "path": spec["model"],
            "activation_checkpointing": "selective" if spec["rival_checkpointing"] else "none",
        },
        "data": {"path": str(folder / "data.jsonl"), "max_tokens": spec["max_tokens"]},
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "max_steps": spec["n_steps"] + 1,
        "checkpoint": {"every_steps": 0},
        "adapter": {"rank": spec["lora_rank"], "alpha": spec["lora_alpha"], "dropout": 0.0},
        "optimizer": {"lr": spec["lr"], "schedule": "constant"},
    }
    if work == "mntp":
        values["mntp"] = {"mask_rate": spec["mask_rate"]}
        values["data"]["long_texts"] = "split"
        values["batch"] = {"global_batch_size": 4, "micro_batch_tokens": 4 * spec["max_tokens"]}
        rows = [{"text": " ".join(spec["texts"])}]
    elif work == "simcse":
        values["simcse"] = {"attention_dropout": 0.0, "scale": spec["scale"]}
        values["batch"] = {"global_batch_size": len(spec["texts"]), "micro_batch_tokens": 2**20}
        rows = [{"text": text} for text in spec["texts"]]
    else:
        values["supervised"] = {"scale": spec["scale"]}
        values["batch"] = {"global_batch_size": len(spec["examples"]), "micro_batch_tokens": 2**20}
        names = ("query", "positive", "negative")
        rows = [dict(zip(names, example, strict=True)) for example in spec["examples"]]
    if tokens := spec.get("micro_batch_tokens"):
        values["batch"]["micro_batch_tokens"] = tokens
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(values)


def train(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    run(recipe_of(spec, folder))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if len({row["n_tokens"] for row in rows}) > 1:
        sys.exit("error: steps differ in tokens, their times would not compare")
    return {
        "seconds": [row["step_ms"] / 1e3 for row in rows[1:]],
        "loss": rows[0]["loss"],
        "n_tokens": rows[0]["n_tokens"],
    }


def encode(spec: dict[str, Any]) -> dict[str, Any]:
    encoder = Encoder.from_pretrained(spec["model"])
    encoder.encode(spec["texts"][:8])
    started = time.perf_counter()
    vectors = encoder.encode(spec["texts"])
    return {"seconds": [time.perf_counter() - started], "vectors": vectors[:200].tolist()}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    given = json.loads(path.read_text())
    torch.set_num_threads(given["threads"])
    print(json.dumps(encode(given) if given["work"] == "encode" else train(given, path.parent)))
