"""Averages a run's last checkpoints into one encoder (Izmailov et al., 2018, arXiv 1803.05407)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import CHECKPOINTS, RECIPE, identity_stored_in
from llm2vec_ds.engine.build import encoder_before_training
from llm2vec_ds.engine.checkpoint import Checkpoint, CheckpointStore
from llm2vec_ds.engine.trainable_state import weight_files
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.merged_folder import check_merged_folder, save_merged
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.recipe.files import load_recipe
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)

ENCODER_PREFIX = "encoder.trunk."
"""Prefix of the trunk's parameter names in the model of every objective."""


def soup(run: Path, n_last: int, output: Path, *, overwrite: bool = False) -> list[int]:
    """Writes the mean of the newest `n_last` valid checkpoints to `output`.

    Adapters are merged before averaging. The mean of products B·A is not the product of the means.

    Returns:
        The steps of these checkpoints, newest first.

    Raises:
        UserError: `run` is not a run, has too few valid checkpoints, or trains over NF4. Or its model has
            changed. Or `output` exists and `overwrite` is false.
    """
    check_merged_folder(output, [run], overwrite)
    if not (run / RECIPE).is_file():
        raise UserError(f"{run} is not a run, it has no {RECIPE}: give the folder of a run")
    recipe = load_recipe(run / RECIPE)
    if recipe.model.quantization is not None:
        raise UserError(
            f"{run} trains over NF4, so --last cannot average its checkpoints: merge its adapters without "
            "--last"
        )
    _check_base(run, recipe)
    checkpoints = _newest(run, n_last)
    encoder, total = encoder_before_training(recipe, torch.device("cpu")), None
    for checkpoint in checkpoints:
        _set(encoder.trunk, checkpoint)
        state = {name: tensor.double() for name, tensor in merged_state_dict(encoder.trunk).items()}
        total = state if total is None else {name: total[name] + state[name] for name in state}
    assert total is not None
    _save(recipe, encoder, {name: tensor / n_last for name, tensor in total.items()}, output)
    return [checkpoint.step for checkpoint in checkpoints]


def _check_base(run: Path, recipe: Recipe) -> None:
    """Checks that the run's model is still the one that its checkpoints were trained on."""
    stored, now = identity_stored_in(run), model_fingerprint(recipe.model.path)
    if stored is not None and None not in (stored["model"], now) and stored["model"] != now:
        raise UserError(
            f"{recipe.model.path}, from which {run} started, has changed since: restore it, or train again"
        )


def _newest(run: Path, n_last: int) -> list[Checkpoint]:
    store = CheckpointStore(run / CHECKPOINTS, keep_last=n_last)
    found = store.newest(n_last)
    if not found:
        raise UserError(
            f"{run} has no valid checkpoint: train with a checkpoint.every_steps below the number of steps"
        )
    if len(found) < n_last:
        raise UserError(
            f"{run} has only {len(found)} valid checkpoint(s) of {n_last}: lower --last, or train with a "
            "larger checkpoint.keep_last"
        )
    return found


def _set(trunk: nn.Module, checkpoint: Checkpoint) -> None:
    """Sets the trunk's trainable parameters from a checkpoint, which was checked before.

    Takes the weights themselves, not their moving average, which `optimizer.ema` saves beside them.
    """
    parameters = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
    missing = set(parameters)
    for file in weight_files(checkpoint.manifest.files):
        with safe_open(checkpoint.folder / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, _, part = key.rpartition("/")
                name = name.removeprefix(ENCODER_PREFIX)
                if part == "value" and name in parameters:
                    parameters[name].data.copy_(tensors.get_tensor(key))
                    missing.discard(name)
    if missing:
        raise UserError(
            f"{checkpoint.folder} has no {min(missing)}, so its run trained another model: give that run's "
            "own folder"
        )


def _save(recipe: Recipe, encoder: Encoder, state: dict[str, torch.Tensor], output: Path) -> None:
    like = merged_state_dict(encoder.trunk)
    save_merged(encoder, output, {name: tensor.to(like[name].dtype) for name, tensor in state.items()})
    log.info("%s: the mean of the last checkpoints of stage %s", output, recipe.stage)
