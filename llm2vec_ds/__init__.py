"""LLM2Vec-DS: turn a decoder-only LLM into a text encoder.

`from llm2vec_ds import Encoder` is loaded on first use, so that `import llm2vec_ds` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Encoder", "EncoderSettings", "UserError", "__version__", "load_vectors", "vector_blocks"]

if TYPE_CHECKING:
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.encoder.settings import EncoderSettings
    from llm2vec_ds.errors import UserError
    from llm2vec_ds.vectors.files import load_vectors, vector_blocks

_MODULES = {
    "Encoder": "encoder.encoder",
    "EncoderSettings": "encoder.settings",
    "UserError": "errors",
    "load_vectors": "vectors.files",
    "vector_blocks": "vectors.files",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"llm2vec_ds.{_MODULES[name]}"), name)
