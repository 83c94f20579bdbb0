"""The model that teaches: text in, vectors out."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import SETTINGS_FILE
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.loading import loading

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Texts → `[texts, width]` fp32."""

TEXTS_PER_PASS = 32
SAFE_FROM = 6
"""Earlier versions of sentence-transformers run code that lies in a model's folder, unasked."""


def load_teacher(path: str, prompt: str | None, device: torch.device) -> Encode:
    """An encoder of this toolkit, else a sentence-transformers model.

    Args:
        prompt: put before each text; of an encoder of this toolkit its instruction, which is not pooled.

    Raises:
        UserError: no such model, or it cannot be loaded.
    """
    if (Path(path) / SETTINGS_FILE).is_file():
        encoder = Encoder.from_pretrained(path, device=device)
        log.info("teacher %s: an encoder of this toolkit", path)
        return lambda texts: encoder.encode(texts, instruction=prompt)
    model = _sentence_transformer(path, device)
    log.info("teacher %s: sentence-transformers, %s", path, ", ".join(type(m).__name__ for m in model))

    def encode(texts: list[str]) -> np.ndarray:
        found = model.encode(texts, prompt=prompt, batch_size=TEXTS_PER_PASS, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode


def _sentence_transformer(path: str, device: torch.device) -> Any:
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"distil.teacher {path}: there is no such folder")
    if Path(path).is_dir() and not (Path(path) / "modules.json").is_file():
        raise UserError(
            f"distil.teacher {path} has no modules.json: name a sentence-transformers folder, an encoder of "
            "this toolkit, or vectors that llm2vec-ds encode wrote"
        )
    install = "pip install 'llm2vec-ds[distil]'"
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(f"distil.teacher {path} needs the package sentence-transformers: {install}")
    if int((found := version("sentence-transformers")).partition(".")[0]) < SAFE_FROM:
        raise UserError(
            f"sentence-transformers {found} runs code that lies beside a model, unasked: {install}, which "
            f"takes {SAFE_FROM}.0 or later"
        )
    from sentence_transformers import SentenceTransformer

    with loading(path):
        return SentenceTransformer(path, device=str(device), trust_remote_code=False)
