"""Which model and which data a result belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2vec_ds import __version__
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.storage.fingerprint import key_of

FORMAT_VERSION = 2
"""Of kept scores and word vectors."""


def weights_key(model: str) -> str:
    """Changes with a folder's weights; a hub id stands for itself."""
    return str(model_fingerprint(model)) if Path(model).is_dir() else model


def result_key(*parts: Any) -> str:
    """Changes with any of the parts, and with this package's version, which scores are of too."""
    return key_of(__version__, *parts, version=FORMAT_VERSION)


def model_name(model: str) -> str:
    """`owner/name` of a hub id; a folder's own name and its parent's."""
    if not Path(model).is_dir():
        return model if "/" in model else f"local/{model}"
    folder = Path(model).resolve()
    return f"{folder.parent.name or 'local'}/{folder.name}"
