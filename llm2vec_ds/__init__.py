"""LLM2Vec-DS: turn a decoder-only LLM into a text encoder.

`from llm2vec_ds import Encoder` is loaded on first use, so that `import llm2vec_ds` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]

if TYPE_CHECKING:
    from llm2vec_ds.encoder import Encoder


def __getattr__(name: str) -> Any:
    if name == "Encoder":
        from llm2vec_ds.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
