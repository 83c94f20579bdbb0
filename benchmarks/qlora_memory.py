"""Compares peak memory and speed of QLoRA steps with the plan, on a GPU limited to a smaller one's memory.

    python benchmarks/qlora_memory.py recipes/qlora_7b_24gb.yaml --steps 5

It writes a model of random weights in the shape of the recipe's `model.config_file` (13.5 GB for 7B). Then it
trains MNTP and SimCSE steps on texts of the longest length that the recipe allows.
`torch.cuda.set_per_process_memory_fraction` sets the limit to the recipe's `machine.memory_gib`. There is one
JSON line a stage. `--cpu` runs without the limit and with plain AdamW, to check that the script works. It has
not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

WORDS = "the river runs past an old mill where children fish for trout and bread is baked".split()
SPECIAL = ["_", "<unk>", "</s>"]


def write_model(config_file: Path, folder: Path, cpu: bool) -> None:
    """Writes random weights in bf16 (fp32 for a CPU run), made on the host, and a tokenizer of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    dtype = torch.float32 if cpu else torch.bfloat16
    config = AutoConfig.from_pretrained(config_file, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS + SPECIAL)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_texts(path: Path, n_texts: int, n_words: int) -> None:
    """Writes distinct texts of `n_words` tokens each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (n_texts, n_words), generator=generator).tolist()
    path.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows) + "\n")


def measure(
    recipe_file: Path, stage: str, model: Path, scratch: Path, steps: int, cpu: bool
) -> dict[str, Any]:
    """Runs a few steps of one stage through the function of the ordinary command."""
    from llm2vec_ds.engine.run_stages import train_stages
    from llm2vec_ds.recipe.files import load_recipe

    run, texts = scratch / stage, scratch / f"{stage}.txt"
    plain = load_recipe(recipe_file, [f"stage={stage}"])
    write_texts(texts, 2 * plain.batch.global_batch_size, plain.data.max_tokens)
    changes = [
        f"stage={stage}",
        f"max_steps={steps}",
        "optimizer.warmup_steps=0",
        f"data.path={texts}",
        f"data.prepared_dir={scratch}/prepared",
    ]
    changes += ["optimizer.name=adamw"] if cpu else []
    recipe = load_recipe(recipe_file, changes)
    # Each stage starts from the base model, because its cost does not depend on the weights.
    moved = {"model": recipe.model.model_copy(update={"path": str(model)}), "output_dir": str(run)}
    train_stages([recipe.model_copy(update=moved)])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = rows[1:] or rows
    return {
        "recipe": recipe_file.name,
        "stage": stage,
        "limit_gib": None if cpu else recipe.machine.memory_gib,
        "tokens_per_s": round(median(row["tokens_per_s"] for row in timed), 1),
        "step_ms": round(median(row["step_ms"] for row in timed), 1),
        **json.loads((run / "memory.json").read_text()),
        "device": platform.processor() if cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "deepspeed", "peft")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", nargs="+", default=["mntp", "simcse"])
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("error: no CUDA device here: --cpu runs without one, for a small model", file=sys.stderr)
        return 2
    from llm2vec_ds.cli.common import quiet_libraries
    from llm2vec_ds.recipe.files import load_recipe

    quiet_libraries()
    first = load_recipe(options.recipe, [f"stage={options.stages[0]}"])
    if not options.cpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, first.machine.memory_gib * 2**30 / total))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_model(Path(str(first.model.config_file)), scratch / "model", options.cpu)
        for stage in options.stages:
            result = measure(options.recipe, stage, scratch / "model", scratch, options.steps, options.cpu)
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
