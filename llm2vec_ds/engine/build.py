"""Builds a recipe's stage: prepared texts, a model with adapters, and the objective over both."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2vec_ds.data.pairs import PreparedPairs, load_prepared_pairs, prepare_all
from llm2vec_ds.data.prepare import PreparedTexts, load_prepared
from llm2vec_ds.data.prepared_folder import largest_id_in
from llm2vec_ds.data.prompts import template_for
from llm2vec_ds.distributed import agreed, on_first_rank, world_size
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import EncoderSettings
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapter_stack import AdapterStack, put_stack_in, read_stack
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.damage import check_ids, check_length, check_vocabulary
from llm2vec_ds.model.loading import (
    Partition,
    TrunkOptions,
    load_tokenizer,
    load_trunk,
    load_trunk_and_head,
)
from llm2vec_ds.model.peft_adapters import merge_adapters, tokenizer_place
from llm2vec_ds.model.recomputation import recompute_activations
from llm2vec_ds.objectives.base import Parts, Stage
from llm2vec_ds.objectives.registry import objective_of
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)

Groups = dict[str, list[Path]]
"""Maps a group to its folders of prepared texts. Without pairs the only group is `texts`."""


def build_stage(recipe: Recipe, device: torch.device, partition: Partition = nullcontext) -> Stage:
    """Builds the stage of a recipe. All ranks call it together.

    Args:
        partition: see `TrunkOptions`.

    Raises:
        UserError: data or model cannot be used, or do not suit the objective.
    """
    objective = objective_of(recipe)
    tokenizer = tokenizer_of(recipe)
    prepared = prepared_groups(recipe, tokenizer)
    training, *held_out = (rows_of(recipe, groups) for groups in prepared)
    if held_out and len(held_out[0]) < world_size():
        raise UserError(
            f"data.held_out_path has {len(held_out[0])} texts or pairs for {world_size()} ranks: give at "
            "least one for each rank"
        )
    stack = agreed(lambda: read_stack(recipe.model.path, recipe.model.quantization, recipe.adapter))
    # Adapters can only be merged into whole weights. ZeRO-3 splits those afterwards.
    options = _trunk_options(recipe, device, nullcontext if stack.merged else partition)
    trunk, language_head = agreed(lambda: _load(stack, options, head=objective.uses_language_head))
    check_vocabulary(tokenizer, trunk)
    check_ids(_largest_id(prepared), trunk)
    check_length(max(rows.longest for rows in (training, *held_out)), trunk)
    _make_trainable(recipe, trunk, stack)
    encoder = _encoder(recipe, trunk, tokenizer, stack)
    return objective.build(Parts(recipe, encoder, language_head, training, held_out[0] if held_out else None))


def encoder_before_training(recipe: Recipe, device: torch.device) -> Encoder:
    """Returns the encoder with its adapters as they are before the first step. Reads no data.

    Raises:
        UserError: the model cannot be used.
    """
    stack = read_stack(recipe.model.path, recipe.model.quantization, recipe.adapter)
    trunk, _ = _load(stack, _trunk_options(recipe, device, nullcontext), head=False)
    _make_trainable(recipe, trunk, stack)
    return _encoder(recipe, trunk, tokenizer_of(recipe), stack)


def tokenizer_of(recipe: Recipe) -> Any:
    place = tokenizer_place(recipe.model.path)
    return load_tokenizer(place, trust_remote_code=recipe.model.trust_remote_code)


def prepared_groups(recipe: Recipe, tokenizer: Any) -> list[Groups]:
    """Returns the groups of the training texts, and those of held-out texts if there are any.

    Rank 0 prepares them, and what else the objective needs, while the others wait.
    """

    def prepare() -> list[Groups]:
        folders = prepare_all(recipe, tokenizer)
        objective_of(recipe).prepare(recipe)
        return folders

    return on_first_rank(prepare)


def rows_of(recipe: Recipe, groups: Groups) -> PreparedTexts | PreparedPairs:
    """Opens the prepared texts or pairs."""
    if recipe.objective.reads_pairs:
        return load_prepared_pairs(groups)
    return load_prepared(*groups["texts"])


def _load(stack: AdapterStack, options: TrunkOptions, *, head: bool) -> tuple[Any, nn.Linear | None]:
    base = stack.base
    loaded = load_trunk_and_head(base, options) if head else (load_trunk(base, options), None)
    merge_adapters(loaded[0], stack.merged)
    return loaded


def _largest_id(prepared: list[Groups]) -> int:
    folders = [folder for groups in prepared for of_group in groups.values() for folder in of_group]
    return max(map(largest_id_in, folders))


def _trunk_options(recipe: Recipe, device: torch.device, partition: Partition) -> TrunkOptions:
    model = recipe.model
    return TrunkOptions(
        causal=model.causal,
        attention=model.attention,
        precision=model.precision,
        # None instead of 0: a config without this attribute can be used if no dropout is asked for.
        attention_dropout=recipe.objective.attention_dropout or None,
        device=device,
        partition=partition,
        trust_remote_code=model.trust_remote_code,
        quantization=model.quantization,
        fused_layers=model.fused_layers,
    )


def _make_trainable(recipe: Recipe, trunk: Any, stack: AdapterStack) -> None:
    if recipe.adapter is not None:
        # The seed is set here, so adapters do not depend on random numbers that loading drew. Under ZeRO-3
        # loading draws some, because it fills memory first.
        torch.manual_seed(recipe.seed)
        put_stack_in(trunk, stack)
        names = add_lora(trunk, recipe.adapter)
        below = f" over {len(stack.earlier)} adapter(s) of earlier stages" if stack.earlier else ""
        adapter = recipe.adapter
        log.info("%s rank %s on %s linear layers%s", adapter.variant, adapter.rank, len(names), below)
    done = recompute_activations(trunk, recipe.model.activation_checkpointing)
    log.info("activation checkpointing: %s", done)


def _encoder(recipe: Recipe, trunk: Any, tokenizer: Any, stack: AdapterStack) -> Encoder:
    template = template_for(recipe.data.template, tokenizer)
    settings = EncoderSettings(
        recipe.pooling,
        template=template.form,
        special_tokens=template.special_tokens,
        pooled_tokens=recipe.pooled_tokens,
    )
    encoder = Encoder(trunk, tokenizer, settings)
    if recipe.model.quantization is not None:
        encoder.stack = stack
    return encoder
