"""Runs a recipe, from its start to a finished run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from llm2vec_ds.distributed import (
    Ranks,
    explain_lost_rank,
    export_ranks,
    on_first_rank,
    ranks_from_environment,
)
from llm2vec_ds.encoder.of_run import CHECKPOINTS, with_encoders_of_runs
from llm2vec_ds.engine.build import build_stage
from llm2vec_ds.engine.checkpoint import CheckpointStore
from llm2vec_ds.engine.deepspeed_engine import (
    Engine,
    deepspeed_config,
    partition_for,
    start_process_group,
)
from llm2vec_ds.engine.identity import identity_of
from llm2vec_ds.engine.memory import explains_full_memory, memory_report
from llm2vec_ds.engine.monitors import wandb_run
from llm2vec_ds.engine.resume import checkpoint_to_resume, is_done
from llm2vec_ds.engine.run_folder import LOCK, begin, check_run_folder, clear_unfinished
from llm2vec_ds.engine.trainer import Evaluation, Trainer
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapters import n_fused
from llm2vec_ds.model.loading import TrunkOptions
from llm2vec_ds.process.environment import set_defaults
from llm2vec_ds.process.host_heap import freed_memory_is_kept
from llm2vec_ds.process.preemption import StopRequest
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.lock import held

log = logging.getLogger(__name__)


@explains_full_memory
def train(recipe: Recipe, evaluation: Evaluation | None = None, *, more_follow: bool = False) -> Path:
    """Runs a recipe on this process and, under a launcher, on all its ranks. Returns the run's folder.

    Args:
        evaluation: measures the encoder when `recipe.evaluation` says so.
        more_follow: other runs come after this one. If the run is asked to stop in its last step, it stops
            before them.

    Raises:
        UserError: something that the user can fix. Raised before training if it can be known then.
        Stopped: a signal or the file STOP asked the run to stop. Everything is saved.
    """
    ranks = ranks_from_environment()
    recipe = with_encoders_of_runs(recipe)
    check_batch(recipe, ranks)
    folder = Path(recipe.output_dir)
    # Every rank checks, before any waits for another. If rank 0 alone failed here, the others would wait.
    check_run_folder(recipe, folder)
    stop = StopRequest(folder)
    with stop.listening(recipe.checkpoint.signals), explain_lost_rank("before or after the steps"):
        export_ranks(ranks)
        device = start_process_group(ranks)
        if recipe.deterministic:
            _use_deterministic_algorithms()
        with _locked(recipe, folder):
            if is_done(recipe, folder):
                log.info("%s: finished already, nothing to do", folder)
                return folder
            asked = _train(recipe, ranks, device, folder, stop, evaluation)
    if asked and more_follow:
        raise stop.stopped(f"after the last step of {recipe.stage}, its encoder written")
    return folder


@contextmanager
def _locked(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Locks the folder against other runs. Checks it again, since a run may have started or ended there."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(held(folder / LOCK, f"output_dir {folder}"))
            check_run_folder(recipe, folder)
            clear_unfinished(folder)

        on_first_rank(lock)
        yield


def _train(
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    stop: StopRequest,
    evaluation: Evaluation | None,
) -> bool:
    """Trains. Returns whether the run was asked to stop in its last step."""
    dtype = TrunkOptions(precision=recipe.model.precision, device=device).dtype
    config = deepspeed_config(recipe, ranks.world_size, dtype)
    stage = build_stage(recipe, device, partition_for(config))
    recipe = _with_steps(recipe, stage.global_batch.steps_per_epoch)
    identity = on_first_rank(lambda: identity_of(recipe, stage.data_fingerprint))
    store = CheckpointStore(
        folder / CHECKPOINTS,
        keep_last=recipe.checkpoint.keep_last,
        best_by=recipe.checkpoint.best_by,
        lowest_is_best=recipe.checkpoint.lowest_is_best,
    )
    checkpoint = on_first_rank(lambda: checkpoint_to_resume(recipe, folder, store, identity))
    on_first_rank(lambda: begin(recipe, folder, identity, fresh=checkpoint is None))
    log.info(
        "%s: %s a step, %s steps, %s process(es)",
        recipe.stage,
        recipe.batch.global_batch_size,
        recipe.max_steps,
        ranks.world_size,
    )
    with wandb_run(recipe, folder):
        engine = Engine(stage.model, config)
        log.info("linear layers fused with their adapter: %s", n_fused(stage.model))
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
        with heap, memory_report(recipe, stage, engine, folder), stop.stepping():
            return trainer.run(checkpoint)


def _with_steps(recipe: Recipe, steps_per_epoch: int) -> Recipe:
    """Returns the recipe with `max_steps` set from `epochs`, if it gives `epochs`."""
    counted = recipe.with_steps_of_epochs(steps_per_epoch)
    if recipe.epochs is not None:
        log.info("epochs %g: %s steps, %s an epoch", recipe.epochs, counted.max_steps, steps_per_epoch)
    return counted


def _use_deterministic_algorithms() -> None:
    set_defaults({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "cuBLAS, which is deterministic then")
    torch.use_deterministic_algorithms(True)


def check_batch(recipe: Recipe, ranks: Ranks) -> None:
    """Refuses a global batch with fewer texts than ranks, and a token budget that is too small for a text."""
    if recipe.batch.global_batch_size < ranks.world_size:
        raise UserError(
            f"batch.global_batch_size={recipe.batch.global_batch_size} leaves some of "
            f"{ranks.world_size} ranks without a text: raise it"
        )
    needed = recipe.data.max_tokens
    if recipe.batch.micro_batch_tokens < needed:
        raise UserError(
            f"batch.micro_batch_tokens={recipe.batch.micro_batch_tokens} cannot hold "
            f"a text of data.max_tokens={recipe.data.max_tokens}: raise it to at least {needed}"
        )
