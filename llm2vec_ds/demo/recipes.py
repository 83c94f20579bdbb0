"""The demo's budgets, and the ordinary recipes of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm2vec_ds.demo.text import DemoText
from llm2vec_ds.encoder.of_run import ENCODER
from llm2vec_ds.model.loading import load_tokenizer


@dataclass(frozen=True)
class Budget:
    """How many tokens each stage trains on, and its settings.

    Tokens count both SimCSE passes. A budget fixes tokens, not time. So a slow machine gives the same result
    later.
    """

    tokens: dict[str, int]
    settings: dict[str, dict[str, Any]]


SMALL_MNTP = {
    "optimizer": {"lr": 5e-4, "warmup_steps": 2, "schedule": "linear"},
    "batch": {"global_batch_size": 8, "micro_batch_tokens": 1024},
}
SMALL_SIMCSE = {
    "simcse": {"attention_dropout": 0.1},
    "optimizer": {"lr": 1e-3, "warmup_steps": 5, "schedule": "constant"},
    "batch": {"global_batch_size": 48, "micro_batch_tokens": 2048},
}
# With so few tokens, small batches train better: there are more steps.
QUICK_SIMCSE = SMALL_SIMCSE | {"batch": {"global_batch_size": 16, "micro_batch_tokens": 2048}}
SMALL_DISTIL = {
    "optimizer": {"lr": 1e-3, "warmup_steps": 5, "schedule": "linear"},
    "batch": {"global_batch_size": 32, "micro_batch_tokens": 1024},
}
BUDGETS = {
    "quick": Budget(
        {"mntp": 6_000, "simcse": 14_000, "distil": 14_000},
        {"mntp": SMALL_MNTP, "simcse": QUICK_SIMCSE, "distil": SMALL_DISTIL},
    ),
    "default": Budget(
        {"mntp": 24_000, "simcse": 76_000, "distil": 126_000},
        {"mntp": SMALL_MNTP, "simcse": SMALL_SIMCSE, "distil": SMALL_DISTIL},
    ),
    # Steps and batches as in the paper (32 × 512 tokens and 128 sentences, 1000 steps each), for a GPU.
    "full": Budget(
        {"mntp": 1000 * 32 * 128, "simcse": 1000 * 128 * 2 * 18, "distil": 1000 * 256 * 18},
        {
            "mntp": {
                "optimizer": {"lr": 5e-5},
                "batch": {"global_batch_size": 32, "micro_batch_tokens": 16384},
            },
            "simcse": {
                "optimizer": {"lr": 3e-5},
                "batch": {"global_batch_size": 128, "micro_batch_tokens": 16384},
            },
            "distil": {
                "optimizer": {"lr": 1e-3, "warmup_steps": 20},
                "batch": {"global_batch_size": 256, "micro_batch_tokens": 16384},
            },
        },
    ),
}


class LastStage(NamedTuple):
    """What comes after MNTP: the stage, and its section of the recipe."""

    stage: str
    section: dict[str, Any]

    @property
    def teacher(self) -> str | None:
        """Names the teacher, by the last part of its path. None: SimCSE has none."""
        if self.stage == "simcse":
            return None
        section = self.section["distil"]
        name, layer = Path(section["teacher"]).name, section.get("teacher_layer")
        return name if layer is None else f"{name}, layer {layer}"


def last_stage(base: str, teacher: str | None, simcse: bool) -> LastStage:
    """Returns SimCSE, distillation from a teacher, or from the base's own first layer (docs/results.md)."""
    if simcse:
        return LastStage("simcse", {})
    if teacher is not None:
        return LastStage("distil", {"distil": {"teacher": teacher}})
    return LastStage("distil", {"distil": {"teacher": base, "teacher_layer": 1, "teacher_whitening": 0.5}})


def write_recipes(
    output: Path,
    base: str,
    material: DemoText,
    budget: Budget,
    seed: int,
    quantization: str | None,
    last: LastStage,
) -> dict[str, Path]:
    """Writes text files and the recipes of both stages. Budget and mean length give the number of steps."""
    material.write(output)
    tokenizer = load_tokenizer(base)
    common = {"seed": seed, "overwrite": True}
    plans = {
        "mntp": {
            **common,
            "model": {"path": base, "quantization": quantization},
            "data": {
                "path": str(output / "paragraphs.txt"),
                "held_out_path": str(output / "held_out.txt"),
                "max_tokens": 128,
                "long_texts": "split",
            },
            **budget.settings["mntp"],
        },
    }
    plans[last.stage] = {
        **common,
        "model": {"path": str(output / "mntp" / ENCODER), "quantization": quantization},
        "data": {"path": str(output / "sentences.txt"), "max_tokens": 128},
        **last.section,
        **budget.settings[last.stage],
    }
    sentence_tokens = _mean_tokens(tokenizer, material.sentences, 128)
    tokens_per_text = {
        "mntp": _mean_tokens(tokenizer, material.paragraphs, 128),
        "simcse": 2 * sentence_tokens,
        "distil": sentence_tokens,
    }
    paths = {}
    for stage, plan in plans.items():
        tokens_per_step = tokens_per_text[stage] * plan["batch"]["global_batch_size"]
        steps = max(1, round(budget.tokens[stage] / tokens_per_step))
        recipe = {"stage": stage, "output_dir": str(output / stage), "max_steps": steps, **plan}
        paths[stage] = output / f"{stage}.yaml"
        paths[stage].write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return paths


def _mean_tokens(tokenizer: Any, texts: list[str], max_tokens: int) -> float:
    """Returns the mean tokens of a row. A longer text becomes several blocks of `max_tokens`."""
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return sum(lengths) / sum(-(-length // max_tokens) for length in lengths)
