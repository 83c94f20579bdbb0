"""What llama.cpp makes of a GGUF file, asked in another process, which its errors end."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_ds.export.checked import ask_reader

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
    answer = ask_reader("llama.cpp", CHILD, file, n_tokens, texts)
    return Answer(answer["ids"], np.array(answer["vectors"], dtype=np.float32))
