"""A recipe → a finished run folder: puts data, model, stage and engine together."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.config import Recipe, dump_recipe
from llm2vec_ds.data.masking import Masking
from llm2vec_ds.data.prepare import PreparedTexts, load_prepared, prepare_all
from llm2vec_ds.data.prompts import template_for
from llm2vec_ds.distributed import (
    Ranks,
    all_gather_object,
    export_ranks,
    rank,
    ranks_from_environment,
)
from llm2vec_ds.encoder import Encoder, EncoderSettings
from llm2vec_ds.engine.deepspeed_engine import Engine, deepspeed_config, start_process_group
from llm2vec_ds.engine.trainer import Trainer
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.loss.mntp import MaskedTokenHead, MntpModel
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.loading import TrunkOptions, load_tokenizer, load_trunk, load_trunk_and_head
from llm2vec_ds.stages.base import Stage
from llm2vec_ds.stages.mntp import MntpStage
from llm2vec_ds.stages.simcse import SimcseStage

log = logging.getLogger(__name__)


def train(recipe: Recipe) -> Path:
    """Runs a recipe on this process and, under a launcher, its peers; returns the run's folder.

    Raises:
        UserError: anything the user can mend, before training where it can be known then.
    """
    ranks = ranks_from_environment()
    _check_batch(recipe, ranks)
    folder = Path(recipe.output_dir)
    # On every rank, before any waits for another: rank 0 alone would leave the others waiting.
    _check_run_folder(recipe, folder)
    export_ranks(ranks)
    device = start_process_group(ranks)
    torch.manual_seed(recipe.seed)
    stage = build_stage(recipe, device)
    dtype = next(stage.encoder.trunk.parameters()).dtype
    config = deepspeed_config(recipe, ranks.world_size, dtype)
    if ranks.rank == 0:
        with writing(f"output_dir {folder}"):
            for name in ("metrics.jsonl", "held_out.jsonl"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "monitor", ignore_errors=True)
            dump_recipe(recipe, folder / "recipe.yaml")
        log.info(
            "%s: %s texts, %s a step, %s steps, %s process(es)",
            recipe.stage,
            len(stage.texts),
            recipe.batch.global_batch_size,
            recipe.max_steps,
            ranks.world_size,
        )
    try:
        Trainer(recipe, stage, Engine(stage.model, config), folder).run()
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is full: lower batch.max_tokens_per_micro_batch (now "
            f"{recipe.batch.max_tokens_per_micro_batch}), or set model.activation_checkpointing=true"
        ) from None
    return folder


def build_stage(recipe: Recipe, device: torch.device) -> Stage:
    """Model with adapters, prepared texts, and the objective over both."""
    tokenizer = load_tokenizer(recipe.model.path)
    texts, *held_out = _prepared(recipe, tokenizer)
    if len(texts) < recipe.batch.global_batch_size:
        raise UserError(
            f"{len(texts)} texts do not fill one batch of {recipe.batch.global_batch_size}: "
            "lower batch.global_batch_size or give more data"
        )
    budget = recipe.batch.max_tokens_per_micro_batch
    template = template_for(recipe.data.template, tokenizer)
    settings = EncoderSettings(recipe.pooling, template=template.form, special_tokens=template.special_tokens)
    if recipe.mntp is not None:
        options = _trunk_options(recipe, recipe.mntp.attention_dropout, device)
        trunk, linear = load_trunk_and_head(recipe.model.path, options)
        if recipe.adapter is not None:
            linear.requires_grad_(False)  # adapters alone train; an untied head would otherwise, for nothing
        head = MaskedTokenHead(linear, trunk.config, recipe.mntp.head_chunk_tokens)
        _make_trainable(recipe, trunk)
        return MntpStage(
            MntpModel(Encoder(trunk, tokenizer, settings), head),
            texts,
            held_out[0] if held_out else None,
            Masking.for_tokenizer(tokenizer, recipe.mntp),
            seed=recipe.seed,
            max_tokens_per_micro_batch=budget,
        )
    assert recipe.simcse is not None
    trunk = load_trunk(recipe.model.path, _trunk_options(recipe, recipe.simcse.attention_dropout, device))
    _make_trainable(recipe, trunk)
    return SimcseStage(
        Encoder(trunk, tokenizer, settings),
        texts,
        recipe.simcse,
        seed=recipe.seed,
        max_tokens_per_micro_batch=budget,
    )


def _trunk_options(recipe: Recipe, attention_dropout: float, device: torch.device) -> TrunkOptions:
    model = recipe.model
    # None keeps a config without the attribute usable when no dropout is asked for.
    return TrunkOptions(model.causal, model.attention, model.precision, attention_dropout or None, device)


def _make_trainable(recipe: Recipe, trunk: Any) -> None:
    if recipe.adapter is not None:
        names = add_lora(trunk, recipe.adapter)
        log.info("LoRA rank %s on %s linear layers", recipe.adapter.rank, len(names))
    if recipe.model.activation_checkpointing:
        trunk.activation_checkpointing_enable({"use_reentrant": False})


def _prepared(recipe: Recipe, tokenizer: Any) -> list[PreparedTexts]:
    """Training and held-out texts. Rank 0 prepares while the others wait; its failure is everyone's."""
    folders: list[str] = []
    mistake = ""
    if rank() == 0:
        try:
            folders = [str(folder) for folder in prepare_all(recipe, tokenizer)]
        except UserError as error:
            mistake = str(error)
    folders, mistake = all_gather_object((folders, mistake))[0]
    if mistake:
        raise UserError(mistake)
    return [load_prepared(Path(folder)) for folder in folders]


def _check_batch(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.batch.global_batch_size < ranks.world_size:
        raise UserError(
            f"batch.global_batch_size={recipe.batch.global_batch_size} gives nothing to some of "
            f"{ranks.world_size} ranks: raise it"
        )
    needed = recipe.data.max_tokens * (2 if recipe.stage == "simcse" else 1)
    if recipe.batch.max_tokens_per_micro_batch < needed:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={recipe.batch.max_tokens_per_micro_batch} cannot hold "
            f"a text of data.max_tokens={recipe.data.max_tokens}: raise it to at least {needed}"
        )


def _check_run_folder(recipe: Recipe, folder: Path) -> None:
    if (folder / "metrics.jsonl").exists() and not recipe.overwrite:
        raise UserError(f"{folder} already holds a run: choose another output_dir, or pass overwrite=true")
    with writing(f"output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir {folder} cannot be written: choose a path that you can write to")
