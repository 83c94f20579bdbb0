"""The teacher's vectors of a recipe's texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llm2vec_ds.data.prepared_folder import prepared_root
from llm2vec_ds.data.prompts import Prompt
from llm2vec_ds.data.sources import find_source, stream_texts
from llm2vec_ds.objectives.teacher_vectors import VectorRequest, keep_vectors, limit_of
from llm2vec_ds.recipe.objectives import DistilConfig
from llm2vec_ds.recipe.recipe import Recipe


def prepare_teacher(recipe: Recipe, path: str | list[str]) -> Path:
    """Returns the folder of the teacher's vectors for `path`. Makes it if it is missing or damaged.

    Raises:
        UserError: as in `keep_vectors`.
    """
    return keep_vectors(_wanted(recipe, path))


def teacher_folder(recipe: Recipe, path: str | list[str]) -> Path:
    """Returns the folder that holds, or will hold, the vectors for the texts of `path`."""
    return _wanted(recipe, path).folder


def section_of(recipe: Recipe) -> DistilConfig:
    assert isinstance(recipe.objective, DistilConfig)
    return recipe.objective


def _wanted(recipe: Recipe, path: str | list[str]) -> VectorRequest:
    config, data = section_of(recipe), recipe.data

    def texts() -> Iterator[tuple[int, str]]:
        found = stream_texts(
            find_source(path), data.text_column, Counter(), whole=False, bad_rows=data.bad_rows
        )
        for text in islice(found, data.max_texts):
            if text.strip():
                yield Prompt(data.instruction, text).hash(), text

    return VectorRequest(
        config.teacher,
        "distil.teacher",
        config.teacher_prompt,
        texts,
        [find_source(path).identity(), data.text_column, data.instruction, *limit_of(data)],
        prepared_root(data),
        n_trained=None if recipe.epochs else recipe.max_steps * recipe.batch.global_batch_size,
        layer=config.teacher_layer,
    )
