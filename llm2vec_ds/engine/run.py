"""A recipe → a finished run folder: puts data, model, stage and engine together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.data.pairs import PreparedPairs, load_prepared_pairs, prepare_all
from llm2vec_ds.data.prepare import PreparedTexts, load_prepared
from llm2vec_ds.data.prepared_folder import largest_id_in
from llm2vec_ds.data.prompts import template_for
from llm2vec_ds.distributed import (
    Ranks,
    agreed,
    all_gather_object,
    contact,
    export_ranks,
    rank,
    ranks_from_environment,
)
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import EncoderSettings
from llm2vec_ds.engine.checkpoint import Checkpoint, CheckpointStore
from llm2vec_ds.engine.deepspeed_engine import (
    Engine,
    deepspeed_config,
    partition_for,
    start_process_group,
)
from llm2vec_ds.engine.identity import changes, identity_of, made_by
from llm2vec_ds.engine.memory import explains_full_memory, watched
from llm2vec_ds.engine.run_folder import (
    CHECKPOINTS,
    LOCK,
    another_run,
    begin,
    changes_of_run,
    check_run_folder,
    is_finished,
)
from llm2vec_ds.engine.trainer import Evaluation, Trainer
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapter_stack import AdapterStack, put_stack_in, read_stack
from llm2vec_ds.model.adapters import add_lora, n_fused
from llm2vec_ds.model.damage import check_ids
from llm2vec_ds.model.loading import TrunkOptions, load_tokenizer, load_trunk, load_trunk_and_head
from llm2vec_ds.model.recomputation import recompute_activations
from llm2vec_ds.objectives.base import Stage
from llm2vec_ds.objectives.contrastive.embedding_cache import ContrastiveModel
from llm2vec_ds.objectives.contrastive.info_nce import check_widths
from llm2vec_ds.objectives.contrastive.simcse import simcse_stage
from llm2vec_ds.objectives.contrastive.supervised import supervised_stage
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead, MntpModel
from llm2vec_ds.objectives.mntp.masking import Masking
from llm2vec_ds.objectives.mntp.objective import MntpStage
from llm2vec_ds.process.host_heap import freed_memory_is_kept
from llm2vec_ds.process.preemption import StopRequest
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import MntpConfig
from llm2vec_ds.storage.lock import held

log = logging.getLogger(__name__)

Partition = Callable[[], AbstractContextManager[Any]]


@explains_full_memory
def train(recipe: Recipe, evaluation: Evaluation | None = None, *, more_follow: bool = False) -> Path:
    """Runs a recipe on this process and, under a launcher, its peers; returns the run's folder.

    Args:
        evaluation: called as `recipe.evaluation` says.
        more_follow: other runs come after this one. A request to stop in its last step stops before them.

    Raises:
        UserError: anything the user can mend, before training where it can be known then.
        Stopped: a signal or the file STOP asked for it; everything is saved.
    """
    ranks = ranks_from_environment()
    _check_batch(recipe, ranks)
    folder = Path(recipe.output_dir)
    # On every rank, before any waits for another: rank 0 alone would leave the others waiting.
    check_run_folder(recipe, folder)
    stop = StopRequest(folder)
    with stop.listening(recipe.checkpoint.signals), contact("before or after the steps"):
        export_ranks(ranks)
        device = start_process_group(ranks)
        if recipe.deterministic:
            _use_deterministic_algorithms()
        with _locked(recipe, folder):
            if _is_done(recipe, folder):
                log.info("%s: finished already, nothing to do", folder)
                return folder
            asked = _train(recipe, ranks, device, folder, stop, evaluation)
    if asked and more_follow:
        raise stop.stopped(f"after the last step of {recipe.stage}, its encoder written")
    return folder


@contextmanager
def _locked(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder, in which one may have begun or ended since it was looked at."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(held(folder / LOCK, f"output_dir {folder}"))
            check_run_folder(recipe, folder)

        agreed(lambda: lock() if rank() == 0 else None)
        yield


def _is_done(recipe: Recipe, folder: Path) -> bool:
    """Has this very run finished?

    Raises:
        UserError: a run of something else has, and the recipe asks to go on with it.
    """
    if not all_gather_object(bool(recipe.resume) and is_finished(folder))[0]:
        return False
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    data = _training_data(recipe, _prepared(recipe, tokenizer))

    def differences() -> list[str]:
        return changes_of_run(folder, identity_of(recipe, data.fingerprint)) if rank() == 0 else []

    changed = all_gather_object(agreed(differences))[0]
    if changed and recipe.resume != "force":
        raise another_run(folder, changed)
    return not changed


def _train(
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    stop: StopRequest,
    evaluation: Evaluation | None,
) -> bool:
    """Whether it was asked to stop in its last step."""
    dtype = TrunkOptions(precision=recipe.model.precision, device=device).dtype
    config = deepspeed_config(recipe, ranks.world_size, dtype)
    stage = build_stage(recipe, device, partition_for(config))
    identity = agreed(lambda: identity_of(recipe, stage.data_fingerprint) if rank() == 0 else {})
    store = CheckpointStore(
        folder / CHECKPOINTS,
        keep_last=recipe.checkpoint.keep_last,
        lowest_is_best=recipe.checkpoint.lowest_is_best,
    )
    found = agreed(lambda: _checkpoint_to_resume(recipe, folder, store, identity) if rank() == 0 else None)
    checkpoint = all_gather_object(found)[0]
    fresh = checkpoint is None
    agreed(lambda: begin(recipe, folder, identity, fresh=fresh) if rank() == 0 else None)
    log.info(
        "%s: %s a step, %s steps, %s process(es)",
        recipe.stage,
        recipe.batch.global_batch_size,
        recipe.max_steps,
        ranks.world_size,
    )
    engine = Engine(stage.model, config)
    log.info("linear layers that are one operation with their adapter: %s", n_fused(stage.model))
    trainer = Trainer(
        recipe,
        stage,
        engine,
        folder,
        store=store,
        identity=identity,
        stop=stop,
        evaluation=evaluation,
    )
    heap = freed_memory_is_kept() if device.type == "cpu" else nullcontext()
    with heap, watched(recipe, stage, engine, folder), stop.stepping():
        return trainer.run(checkpoint)


def _checkpoint_to_resume(
    recipe: Recipe, folder: Path, store: CheckpointStore, identity: dict[str, Any]
) -> Checkpoint | None:
    """The newest valid one, if the recipe asks to go on from it and it is of the same run.

    Raises:
        UserError: it is of another run; or there is none, and the folder holds another run or a finished one.
    """
    store.clear_unfinished()
    if not recipe.resume:
        return None
    checkpoint = store.newest_valid()
    if checkpoint is None:
        if changed := changes_of_run(folder, identity):
            raise another_run(folder, changed)
        log.info("no checkpoint in %s yet: starting at step 1", store.folder)
        return None
    manifest = checkpoint.manifest
    if changed := changes(manifest.identity, identity):
        words = "; ".join(changed)
        if recipe.resume != "force":
            raise UserError(
                f"{checkpoint.folder} is of another run ({words}): undo the change, pass resume=force to go "
                "on nevertheless, or overwrite=true without resume to start again"
            )
        log.warning("resume=force: going on although %s", words)
    now = made_by(recipe)
    if moved := [f"{k} {manifest.made_by[k]} → {now[k]}" for k in now if manifest.made_by.get(k) != now[k]]:
        log.warning("losses may differ in their last digits, or in dropout: %s", ", ".join(moved))
    log.info("going on from %s", checkpoint.folder)
    return checkpoint


def _use_deterministic_algorithms() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def build_stage(recipe: Recipe, device: torch.device, partition: Partition = nullcontext) -> Stage:
    """Model with adapters, prepared texts, and the objective over both.

    Args:
        partition: see `TrunkOptions`.
    """
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    prepared = _prepared(recipe, tokenizer)
    options = _trunk_options(recipe, device, partition)
    if recipe.mntp is not None:
        return _mntp_stage(recipe, recipe.mntp, tokenizer, prepared, options)
    config = recipe.contrastive
    assert config is not None
    trunk = agreed(lambda: load_trunk(_stack(recipe).base, options))
    check_ids(_largest_id(prepared), trunk)
    if mistake := check_widths(config.matryoshka_dims, trunk.config.hidden_size):
        raise UserError(mistake)
    _make_trainable(recipe, trunk)
    model = ContrastiveModel(_encoder(recipe, trunk, tokenizer), config)
    common = {
        "seed": recipe.seed,
        "global_batch_size": recipe.batch.global_batch_size,
        "max_tokens_per_micro_batch": recipe.batch.max_tokens_per_micro_batch,
    }
    if recipe.data.pairs is None:
        return simcse_stage(model, load_prepared(*prepared[0]["texts"]), config, **common)
    pairs, *held_out_pairs = (load_prepared_pairs(groups) for groups in prepared)
    log.info("supervised: %s", ", ".join(f"{n} {size}" for n, size in pairs.group_sizes.items()))
    temperature = recipe.data.pairs.sampling_temperature
    held_out_or_none = held_out_pairs[0] if held_out_pairs else None
    return supervised_stage(
        model, pairs, held_out_or_none, config, sampling_temperature=temperature, **common
    )


def _mntp_stage(
    recipe: Recipe,
    config: MntpConfig,
    tokenizer: Any,
    prepared: list[dict[str, list[Path]]],
    options: TrunkOptions,
) -> MntpStage:
    texts, *held_out = (load_prepared(*groups["texts"]) for groups in prepared)
    trunk, linear = agreed(lambda: load_trunk_and_head(_stack(recipe).base, options))
    masking = Masking.for_tokenizer(tokenizer, config)
    check_ids(max(_largest_id(prepared), masking.largest_id), trunk)
    if recipe.adapter is not None:
        linear.requires_grad_(False)  # adapters alone train; an untied head would otherwise, for nothing
    head = MaskedTokenHead(linear, trunk.config, config.head_chunk_tokens)
    _make_trainable(recipe, trunk)
    return MntpStage(
        MntpModel(_encoder(recipe, trunk, tokenizer), head),
        texts,
        held_out[0] if held_out else None,
        masking,
        seed=recipe.seed,
        global_batch_size=recipe.batch.global_batch_size,
        max_tokens_per_micro_batch=recipe.batch.max_tokens_per_micro_batch,
    )


def _encoder(recipe: Recipe, trunk: Any, tokenizer: Any) -> Encoder:
    template = template_for(recipe.data.template, tokenizer)
    settings = EncoderSettings(
        recipe.pooling,
        template=template.form,
        special_tokens=template.special_tokens,
        pooled_tokens=recipe.pooled_tokens,
    )
    encoder = Encoder(trunk, tokenizer, settings)
    if recipe.model.quantization is not None:
        encoder.stack = _stack(recipe)
    return encoder


def _stack(recipe: Recipe) -> AdapterStack:
    return read_stack(recipe.model.path, recipe.model.quantization, recipe.adapter)


def _trunk_options(recipe: Recipe, device: torch.device, partition: Partition) -> TrunkOptions:
    model, objective = recipe.model, recipe.mntp or recipe.contrastive
    assert objective is not None
    # None keeps a config without the attribute usable when no dropout is asked for.
    dropout = objective.attention_dropout or None
    return TrunkOptions(
        model.causal,
        model.attention,
        model.precision,
        dropout,
        device,
        partition,
        model.trust_remote_code,
        model.quantization,
    )


def _make_trainable(recipe: Recipe, trunk: Any) -> None:
    if recipe.adapter is not None:
        # Here, so that the adapters do not depend on what loading drew: under ZeRO-3 it fills memory first.
        torch.manual_seed(recipe.seed)
        put_stack_in(trunk, stack := _stack(recipe))
        names = add_lora(trunk, recipe.adapter)
        below = f" over {len(stack.earlier)} of earlier stages" if stack.earlier else ""
        log.info(
            "%s rank %s on %s linear layers%s",
            recipe.adapter.variant,
            recipe.adapter.rank,
            len(names),
            below,
        )
    log.info("activation checkpointing: %s", recipe.model.activation_checkpointing)
    recompute_activations(trunk, recipe.model.activation_checkpointing)


def _prepared(recipe: Recipe, tokenizer: Any) -> list[dict[str, list[Path]]]:
    """Folders of training and held-out texts by group. Rank 0 prepares while the others wait."""
    folders = agreed(lambda: prepare_all(recipe, tokenizer) if rank() == 0 else [])
    return all_gather_object(folders)[0]


def _training_data(recipe: Recipe, prepared: list[dict[str, list[Path]]]) -> PreparedTexts | PreparedPairs:
    groups = prepared[0]
    return load_prepared(*groups["texts"]) if recipe.data.pairs is None else load_prepared_pairs(groups)


def _largest_id(prepared: list[dict[str, list[Path]]]) -> int:
    folders = [folder for groups in prepared for of_group in groups.values() for folder in of_group]
    return max(map(largest_id_in, folders))


def _check_batch(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.batch.global_batch_size < ranks.world_size:
        raise UserError(
            f"batch.global_batch_size={recipe.batch.global_batch_size} gives nothing to some of "
            f"{ranks.world_size} ranks: raise it"
        )
    needed = recipe.data.max_tokens
    if recipe.batch.max_tokens_per_micro_batch < needed:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={recipe.batch.max_tokens_per_micro_batch} cannot hold "
            f"a text of data.max_tokens={recipe.data.max_tokens}: raise it to at least {needed}"
        )
