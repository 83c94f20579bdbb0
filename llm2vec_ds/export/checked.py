"""Texts whose vectors an export must give, the reader that is asked for them, and the comparison."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.sts import own_graded_pairs

log = logging.getLogger(__name__)

N_CHECKED_TEXTS = 24


def checked_texts() -> list[str]:
    """Mixed lengths: single words, sentences, and some as long as several."""
    pairs = own_graded_pairs()
    sentences = list(dict.fromkeys(pairs.first + pairs.second))[:N_CHECKED_TEXTS]
    return ["word", *sentences, " ".join(sentences), " ".join(sentences[:5])]


def ask_reader(reader: str, module: str, file: Path, n_tokens: int, texts: list[Any]) -> Any:
    """What another tool makes of an exported file, in a separate process, which its errors may end.

    Args:
        module: run as `python -m MODULE FILE N_TOKENS`; it gets JSON `texts` and answers with JSON.
        n_tokens: of the longest text.

    Raises:
        UserError: the tool does not take the file, or ended.
    """
    command = [sys.executable, "-m", module, str(file), str(n_tokens)]
    outcome = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if outcome.returncode:
        said = [line for line in outcome.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{reader} does not take {file.name}: {said[-1] if said else 'it ended without a word'}"
        )
    return json.loads(outcome.stdout)


def compare(reader: str, prompt: str | None, found: np.ndarray, expected: np.ndarray, lowest: float) -> None:
    """Of the vectors that another tool gives, `[N, D]`, and the encoder's.

    Raises:
        UserError: a cosine is under `lowest`, or there is nothing to compare.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(found), np.float64(expected)))
    cosine = float((a * b).sum(axis=1).min(initial=1.0 if len(a) else 0.0))
    words = f" with prompt {prompt!r}" if prompt else ""
    log.info("checked: %s%s gives the encoder's vectors, lowest cosine %.6f", reader, words, cosine)
    if not cosine >= lowest:
        raise UserError(
            f"{reader}{words} does not give the encoder's vectors (lowest cosine {cosine:.4f}, expected "
            f"{lowest}): nothing was exported"
        )
