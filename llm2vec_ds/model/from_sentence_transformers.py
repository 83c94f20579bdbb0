"""Loads models of the package sentence-transformers, without running code that lies beside the weights."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.loading import loading

SAFE_FROM = 6
"""The first version that does not run code from a model's folder without being asked."""
INSTALL = "pip install 'llm2vec-ds[distil]'"


def load_sentence_transformer(path: str, key: str, device: torch.device) -> Any:
    """Loads a bi-encoder. `key` is the recipe key that names it.

    Raises:
        UserError: there is no such model, or the package is missing or too old.
    """
    _check(path, key)
    if Path(path).is_dir() and not (Path(path) / "modules.json").is_file():
        raise UserError(
            f"{key} {path} has no modules.json: name a sentence-transformers folder, an encoder of this "
            "toolkit, or vectors that llm2vec-ds encode wrote"
        )
    from sentence_transformers import SentenceTransformer

    with loading(path):
        return SentenceTransformer(path, device=str(device), trust_remote_code=False)


def load_cross_encoder(path: str, key: str, device: torch.device, max_tokens: int) -> Any:
    """Loads a reranker. It gives one score a pair, as the model computes it, without a sigmoid.

    Raises:
        UserError: as `load_sentence_transformer`, or the model gives several numbers a pair.
    """
    _check(path, key)
    from sentence_transformers import CrossEncoder

    with loading(path):
        model = CrossEncoder(
            path,
            device=str(device),
            trust_remote_code=False,
            max_length=max_tokens,
            activation_fn=torch.nn.Identity(),
        )
    if model.num_labels != 1:
        raise UserError(
            f"{key} {path} gives {model.num_labels} numbers a pair: use a reranker that gives one"
        )
    return model


def _check(path: str, key: str) -> None:
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{key} {path}: there is no such folder")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(f"{key} {path} needs the package sentence-transformers: {INSTALL}")
    if int((found := version("sentence-transformers")).partition(".")[0]) < SAFE_FROM:
        raise UserError(
            f"sentence-transformers {found} runs code that lies beside a model, without being asked: "
            f"{INSTALL}, which installs {SAFE_FROM}.0 or later"
        )
