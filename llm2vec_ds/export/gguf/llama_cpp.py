"""Gets tokens and vectors of a GGUF file from llama.cpp, in a process of its own, which an error may end."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_ds.export.checked import ask_reader

CHILD = "llm2vec_ds.export.gguf.llama_cpp_child"


@dataclass(frozen=True)
class Answer:
    """llama.cpp's result: token ids of each text, and vectors `[N, D]` fp32 of length 1."""

    ids: list[list[int]]
    vectors: np.ndarray


def is_installed() -> bool:
    """Returns whether `xllamacpp`, llama.cpp for Python, is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(file: Path, texts: list[str], n_tokens: int) -> Answer:
    """Returns tokens and vectors of texts. Runs one thread, no flash attention, and fp32 keys and values.

    Args:
        n_tokens: number of tokens of the longest text.

    Raises:
        UserError: llama.cpp cannot read the file, or failed.
    """
    answer = ask_reader("llama.cpp", CHILD, file, n_tokens, texts)
    return Answer(answer["ids"], np.array(answer["vectors"], dtype=np.float32))
