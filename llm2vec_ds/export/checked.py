"""Checks an export: the texts to encode, the call of another tool, and the comparison of vectors."""

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
    """Returns texts of mixed lengths: a word, sentences, and several sentences joined."""
    pairs = own_graded_pairs()
    sentences = list(dict.fromkeys(pairs.first + pairs.second))[:N_CHECKED_TEXTS]
    return ["word", *sentences, " ".join(sentences), " ".join(sentences[:5])]


def ask_reader(reader: str, module: str, file: Path, n_tokens: int, texts: list[Any]) -> Any:
    """Runs another tool on an exported file and returns its answer.

    The tool runs in another process, because its errors may end that process.

    Args:
        module: run as `python -m MODULE FILE N_TOKENS`. It gets `texts` as JSON and answers with JSON.
        n_tokens: number of tokens of the longest text.

    Raises:
        UserError: the tool cannot read the file, or failed.
    """
    command = [sys.executable, "-m", module, str(file), str(n_tokens)]
    outcome = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if outcome.returncode:
        said = [line for line in outcome.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{reader} failed on {file.name}: {said[-1] if said else 'it ended without a message'}"
        )
    return json.loads(outcome.stdout)


def compare(reader: str, prompt: str | None, found: np.ndarray, expected: np.ndarray, lowest: float) -> None:
    """Compares another tool's vectors `[N, D]` with the encoder's.

    Raises:
        UserError: a cosine is below `lowest`, or there is nothing to compare.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(found), np.float64(expected)))
    cosine = float((a * b).sum(axis=1).min(initial=1.0 if len(a) else 0.0))
    words = f" with prompt {prompt!r}" if prompt else ""
    log.info("checked: %s%s, lowest cosine with the encoder's vectors %.6f", reader, words, cosine)
    if not cosine >= lowest:
        raise UserError(
            f"{reader}{words} does not give the encoder's vectors (lowest cosine {cosine:.4f}, expected at "
            f"least {lowest}): nothing was exported"
        )
