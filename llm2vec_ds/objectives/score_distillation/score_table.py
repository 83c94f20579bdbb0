"""A judge's scores on disk, found by query and document. Made once; every rank maps them into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llm2vec_ds.data.pairs import find_pair_sources
from llm2vec_ds.data.prepared_folder import prepared_root
from llm2vec_ds.data.prompts import Prompt, is_text
from llm2vec_ds.data.scored_pairs import stream_scored_rows
from llm2vec_ds.data.sources import find_source
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.objectives import DistilScoresConfig
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.fingerprint import key_of
from llm2vec_ds.storage.kept_folder import keep, read_kept

FORMAT_VERSION = 1
KEYS, SCORES = "keys.npy", "scores.npy"
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio, as in Fibonacci hashing."""


class ScoreTable:
    """Looks up fp32 scores by query and document. If a pair occurs twice, its first score counts."""

    def __init__(self, folder: Path) -> None:
        self.fingerprint = read_kept(folder).fingerprint
        self._keys: np.ndarray = np.load(folder / KEYS, mmap_mode="r")
        self._scores: np.ndarray = np.load(folder / SCORES, mmap_mode="r")

    def __call__(self, queries: np.ndarray, documents: np.ndarray) -> torch.Tensor:
        """Returns the scores `[N]` of pairs of text hashes `[N]`.

        Raises:
            UserError: a pair has no score.
        """
        keys = pair_keys(queries, documents)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        if (missing := int(np.count_nonzero(self._keys[places] != keys))) > 0:
            raise UserError(
                f"{missing} of {len(keys)} documents of a batch have no score: give each row one positive, "
                "its negatives as a list in one column, and one score for each document"
            )
        return torch.from_numpy(np.asarray(self._scores[places]))


def pair_keys(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Joins two 64-bit hashes into one 64-bit key."""
    with np.errstate(over="ignore"):  # the sum wraps around at 2⁶⁴
        keys: np.ndarray = queries.astype(np.uint64) * _FACTOR + documents.astype(np.uint64)
    return keys


def prepare_scores(recipe: Recipe, path: str | list[str]) -> Path:
    """Returns the folder of the scores in the pairs of `path`. Makes it if it is missing or damaged.

    Raises:
        UserError: a row has no scores, or the folder cannot be written.
    """
    folder = score_folder(recipe, path)

    def make(unfinished: Path) -> list[str]:
        keys, scores = _read(recipe, path)
        _, first = np.unique(keys, return_index=True)
        np.save(unfinished / KEYS, keys[first])
        np.save(unfinished / SCORES, scores[first])
        return [KEYS, SCORES]

    keep(folder, "scores", make)
    return folder


def score_folder(recipe: Recipe, path: str | list[str]) -> Path:
    """Returns the folder that holds, or will hold, the scores in the pairs of `path`."""
    data = recipe.data
    assert data.pairs is not None
    root = prepared_root(data)
    pairs = data.pairs.model_dump(include={"query_column", "positive_column", "negative_column"})
    instructions = [
        [source.name, source.instructions.query, source.instructions.document]
        for source in find_pair_sources(data, path)
    ]
    parts = [find_source(path).identity(), pairs, section_of(recipe).score_column, instructions]
    return root / f"scores-{key_of(*parts, version=FORMAT_VERSION)}"


def section_of(recipe: Recipe) -> DistilScoresConfig:
    assert isinstance(recipe.objective, DistilScoresConfig)
    return recipe.objective


def _read(recipe: Recipe, path: str | list[str]) -> tuple[np.ndarray, np.ndarray]:
    queries, documents, scores = [], [], []
    pairs, column = recipe.data.pairs, section_of(recipe).score_column
    assert pairs is not None
    for source in find_pair_sources(recipe.data, path):
        given = source.instructions
        rows = stream_scored_rows(
            find_source(source.path),
            pairs,
            column,
            f"{recipe.stage}.score_column",
            recipe.data.bad_rows,
        )
        for row in rows:
            assert row.scores is not None
            if not all(map(is_text, (row.query, *row.documents))):
                continue  # `prepare` leaves out such rows, too
            query = Prompt(given.query, row.query).hash()
            for document, score in zip(row.documents, row.scores, strict=True):
                queries.append(query)
                documents.append(Prompt(given.document, document).hash())
                scores.append(score)
    keys = pair_keys(np.array(queries, dtype=np.int64), np.array(documents, dtype=np.int64))
    return keys, np.array(scores, dtype=np.float32)
