"""The commands `train` and `prepare`: wiring only."""

from __future__ import annotations

import itertools
import logging

import typer

from llm2vec_ds.cli.common import Overrides, RecipeFile, examples, quiet_libraries
from llm2vec_ds.cli.evaluate import evaluation_of
from llm2vec_ds.errors import Stopped
from llm2vec_ds.process.interrupts import kept

OF_KEYS = {"ignore_unknown_options": True}
"""Passes an option such as `--learning_rate 1e-4` on to the recipe. Its error names the recipe's own key."""


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(
        context_settings=OF_KEYS,
        epilog=examples(
            "train recipes/smoke_mntp.yaml",
            "train recipes/smoke_mntp.yaml max_steps=5 optimizer.lr=1e-4",
            "train recipes/llama2_7b_chat/simcse.yaml deepspeed=ds_configs/zero3.json",
        ),
    )(train)
    app.command(
        context_settings=OF_KEYS,
        epilog=examples(
            "prepare recipes/smoke_mntp.yaml data.prepared_dir=prepared",
            "prepare recipes/smoke_mntp.yaml data.path=hub:owner/name@train",
        ),
    )(prepare)


def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train an encoder: one stage, or all stages of a recipe that has `stages`.

    The run's folder, `output_dir`, gets recipe.yaml, metrics.jsonl and, at the end, encoder/. To go on with a
    run that was stopped, repeat the command with resume=true.

    On one GPU or a CPU, run it as it is. For several GPUs use
    `deepspeed --num_gpus N --module llm2vec_ds train RECIPE`, `srun` with one task per GPU, or any launcher
    that sets RANK, WORLD_SIZE and LOCAL_RANK.
    """
    from llm2vec_ds.recipe.files import load_stages

    resolved = load_stages(recipe, overrides)
    quiet_libraries()
    from llm2vec_ds.distributed import destroy_process_group
    from llm2vec_ds.encoder.of_run import ENCODER
    from llm2vec_ds.engine.run_stages import train_stages

    with kept("checkpoints and prepared texts are kept; run the same command with resume=true to go on"):
        try:
            folder = train_stages(resolved, evaluation_of)
        except Stopped:  # All ranks stop here. After an error only some do, and the next line could hang.
            destroy_process_group()
            raise
    destroy_process_group()
    logging.getLogger("llm2vec_ds").info("done: %s", folder / ENCODER)


@kept("finished parts are kept; run the same command to go on")
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Tokenise a recipe's texts ahead of training.

    Training then starts at once, and its nodes need no network. The texts go to data.prepared_dir, or to your
    cache folder. Training with the same keys finds them there. If the command is stopped, run it again. It
    continues where it stopped.
    """
    from llm2vec_ds.recipe.files import load_stages

    stages = load_stages(recipe, overrides)
    quiet_libraries()
    from llm2vec_ds.data.pairs import prepare_all
    from llm2vec_ds.data.prepared_folder import read_manifest
    from llm2vec_ds.encoder.of_run import with_encoders_of_runs
    from llm2vec_ds.model.loading import load_tokenizer
    from llm2vec_ds.model.peft_adapters import tokenizer_place
    from llm2vec_ds.objectives.registry import objective_of

    # Later stages use the first stage's tokenizer. Their own models do not exist yet.
    stages[0] = with_encoders_of_runs(stages[0])
    model = stages[0].model
    tokenizer = load_tokenizer(tokenizer_place(model.path), trust_remote_code=model.trust_remote_code)
    for groups in itertools.chain(*(prepare_all(stage, tokenizer) for stage in stages)):
        for name, folders in groups.items():
            for folder in folders:
                counts = read_manifest(folder).counts
                print(f"{name}: {counts['rows']} rows, {counts['tokens']} tokens in {folder}")
    for stage in stages:
        objective_of(stage).prepare(stage)
