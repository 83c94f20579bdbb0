"""Checks the arguments of `Encoder.encode`. Users of sentence-transformers learn the names here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KNOWN = (
    *("instruction", "prompt_name", "normalize", "truncate_dim", "micro_batch_tokens"),
    *("bad_texts", "first_row", "show_progress"),
)
OF_SENTENCE_TRANSFORMERS = {
    "batch_size": "micro_batch_tokens",
    "normalize_embeddings": "normalize",
    "prompt": "instruction",
    "show_progress_bar": "show_progress",
}
"""Names of sentence-transformers, and what they are called here."""


def check_arguments(texts: object, options: Mapping[str, Any]) -> None:
    """Checks that there are texts, and that every option is known.

    Raises:
        TypeError: `texts` is None, or an option is unknown. The message names the right one.
    """
    if texts is None:
        raise TypeError("Encoder.encode needs a string or an iterable of strings, not None")
    for name in options:
        if name not in KNOWN:
            instead = OF_SENTENCE_TRANSFORMERS.get(name)
            fix = f"use {instead}" if instead else f"it has {', '.join(KNOWN)}"
            raise TypeError(f"Encoder.encode has no argument {name!r}: {fix}")
