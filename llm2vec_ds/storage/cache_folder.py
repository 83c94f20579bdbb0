"""The cache folder. It holds only files that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Returns LLM2VEC_DS_CACHE, else `llm2vec-ds` in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("LLM2VEC_DS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2vec-ds"
