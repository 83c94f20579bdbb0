"""Keys of what an ablation keeps: they change with everything that a training or a score depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2vec_ds.ablation.recipe import EvaluateConfig
from llm2vec_ds.data.sources import HUB_PREFIX, find_source
from llm2vec_ds.encoder.of_run import CONFIG, encoder_of
from llm2vec_ds.evaluate.identity import encoder_key, result_key, weights_key
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.fingerprint import file_sha256, stat_of


def training_key(recipe: Recipe) -> str:
    """Returns a key of a run: its recipe, the model that it starts from, its data, and teacher or guide.

    Files of data count by path, size and time, models by their content.
    """
    data, objective = recipe.data, recipe.objective
    instructions = None if data.pairs is None else data.pairs.instructions
    others = [place for key in objective.places if (place := getattr(objective, key)) is not None]
    return result_key(
        recipe.model_dump(mode="json"),
        weights_key(recipe.model.path),
        [find_source(path).identity() for path in (data.path, data.held_out_path) if path is not None],
        None if instructions is None else file_sha256(Path(instructions)),
        [_other_model(place) for place in others],
    )


def evaluation_key(evaluate: EvaluateConfig) -> str:
    """Returns a key of the tasks and of the content of their data."""
    from llm2vec_ds.evaluate.mteb_tasks import tasks_for

    words = [place for task in evaluate.words.values() for place in (task.train, task.test)]
    return result_key(
        evaluate.model_dump(),
        [task.metadata.revision for task in tasks_for(evaluate.sentences)] if evaluate.sentences else [],
        [place if place.startswith(HUB_PREFIX) else file_sha256(Path(place)) for place in words],
    )


def score_key(model: str, variant: str, evaluation: str) -> str:
    """Returns a key of a variant's scores: weights and settings of its encoder, and `evaluation_key`."""
    return result_key(encoder_key(model), model, variant, evaluation)


def _other_model(place: str) -> Any:
    """Returns the content of a model, or the identity of a folder or file of vectors."""
    model = Path(encoder_of(place))
    if not model.exists() or (model / CONFIG).is_file():
        return encoder_key(str(model))
    files = sorted(model.rglob("*")) if model.is_dir() else [model]
    return [stat_of(file, str(file)) for file in files]
