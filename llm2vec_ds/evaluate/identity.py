"""Keys that say which model and which data a result belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2vec_ds import __version__
from llm2vec_ds.encoder.settings import stored_settings
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.storage.fingerprint import key_of

FORMAT_VERSION = 2
"""Version of the format of stored scores and word vectors."""


def weights_key(model: str) -> str:
    """Returns a key of a folder's weights. A hub id is its own key."""
    return str(model_fingerprint(model)) if Path(model).is_dir() else model


def encoder_key(model: str) -> str:
    """Returns a key of all that an encoder's vectors depend on: its weights, and settings such as pooling."""
    return result_key(weights_key(model), stored_settings(model))


def result_key(*parts: Any) -> str:
    """Returns a key of all parts and of this package's version, because scores depend on both."""
    return key_of(__version__, *parts, version=FORMAT_VERSION)


def model_name(model: str) -> str:
    """Returns `owner/name` for a hub id. For a folder: the parent's name and its own."""
    if not Path(model).is_dir():
        return model if "/" in model else f"local/{model}"
    folder = Path(model).resolve()
    return f"{folder.parent.name or 'local'}/{folder.name}"
