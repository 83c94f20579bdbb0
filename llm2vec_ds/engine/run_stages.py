"""Trains the stages of one recipe file, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from llm2vec_ds.encoder.of_run import is_finished
from llm2vec_ds.engine.run import train
from llm2vec_ds.engine.trainer import Evaluation
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import EvaluationConfig


def train_stages(
    recipes: list[Recipe],
    evaluation_of: Callable[[EvaluationConfig | None], Evaluation | None] = lambda config: None,
) -> Path:
    """Trains each recipe. If there are several, a finished one is skipped unless its `overwrite` is set.

    Args:
        evaluation_of: makes the measurement that `recipe.evaluation` describes.

    Returns:
        The run folder of the last recipe.

    Raises:
        UserError: as `train`.
    """
    for number, recipe in enumerate(recipes, 1):
        folder = Path(recipe.output_dir)
        if len(recipes) > 1 and not (recipe.overwrite or recipe.resume) and is_finished(folder):
            recipe = recipe.model_copy(update={"resume": True})  # `resume` refuses the run of another recipe
        train(recipe, evaluation_of(recipe.evaluation), more_follow=number < len(recipes))
        gc.collect()  # engine and model refer to each other, and the next stage needs their memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder
