"""Which model and which data a result belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm2vec_ds import __version__
from llm2vec_ds.model.fingerprint import model_fingerprint

KEY_CHARACTERS = 16


def weights_key(model: str) -> str:
    """Changes with a folder's weights; a hub id stands for itself."""
    return str(model_fingerprint(model)) if Path(model).is_dir() else model


def key_of(*parts: Any) -> str:
    """Changes with this package's version and any of the parts, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()[:KEY_CHARACTERS]


def file_key(*files: Path) -> str:
    """Changes with the files' contents."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:KEY_CHARACTERS]


def model_name(model: str) -> str:
    """`owner/name` of a hub id; a folder's own name and its parent's."""
    if not Path(model).is_dir():
        return model if "/" in model else f"local/{model}"
    folder = Path(model).resolve()
    return f"{folder.parent.name or 'local'}/{folder.name}"
