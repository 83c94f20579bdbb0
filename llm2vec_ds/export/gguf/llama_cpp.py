"""What llama.cpp makes of a GGUF file, asked in another process, which its errors end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_ds.errors import UserError

CHILD = "llm2vec_ds.export.gguf.llama_cpp_child"


@dataclass(frozen=True)
class Answer:
    """`ids`: tokens of each text. `vectors`: `[N, D]` fp32, of length 1."""

    ids: list[list[int]]
    vectors: np.ndarray


def is_installed() -> bool:
    """Whether `xllamacpp`, llama.cpp for Python, is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(file: Path, texts: list[str], n_tokens: int) -> Answer:
    """Tokens and vectors of texts, by one thread, without flash attention, keys and values in fp32.

    Args:
        n_tokens: of the longest text.

    Raises:
        UserError: llama.cpp does not take the file, or ended.
    """
    command = [sys.executable, "-m", CHILD, str(file), str(n_tokens)]
    outcome = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if outcome.returncode:
        said = [line for line in outcome.stderr.splitlines() if line.strip()]
        raise UserError(
            f"llama.cpp does not take {file.name}: {said[-1] if said else 'it ended without a word'}"
        )
    answer = json.loads(outcome.stdout)
    return Answer(answer["ids"], np.array(answer["vectors"], dtype=np.float32))
