"""The file `scores.json`, which `evaluate mteb` and `evaluate words` write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import read_json

SCORES_FILE = "scores.json"
OF_MTEB, OF_WORDS = "tasks", "same_token"
"""A key that only this command writes."""


def read_scores(output: Path, kind: str) -> dict[str, Any] | None:
    """Returns what an earlier command of the same `kind` (`OF_MTEB`, `OF_WORDS`) wrote. None: nothing.

    Raises:
        UserError: the file is damaged, or the other command wrote it.
    """
    file = output / SCORES_FILE
    if not file.exists():
        return None
    scores = read_json(file, dict[str, Any], "remove it, and run the same command again")
    if kind not in scores:
        other = "words" if kind == OF_MTEB else "mteb"
        raise UserError(f"{file} was written by `evaluate {other}`: choose another --output")
    return scores
