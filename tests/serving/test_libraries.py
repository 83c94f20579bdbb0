"""The same encoders and texts as for servers, by libraries that are installed beside this package."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import Encoder, UserError
from tests.support.served_encoders import (
    SERVED,
    TABLE,
    TEXTS,
    asked,
    check_rows,
    exported,
    named_row,
    pooling_row,
    tiny_encoder,
)

pytestmark = pytest.mark.slow


def encoders() -> list[tuple[str, Encoder]]:
    return [(kind, tiny_encoder(kind, windows=kind == "gemma3_text", **how)) for kind, how in SERVED]


def test_sentence_transformers(tmp_path: Path) -> None:
    """By its own prompts, so that it can leave them out of the mean."""
    library = pytest.importorskip("sentence_transformers")
    name, rows = f"sentence-transformers {library.__version__}", []
    for i, (kind, encoder) in enumerate(encoders()):
        model = library.SentenceTransformer(str(exported(encoder, tmp_path / str(i))), device="cpu")
        found = [model.encode(TEXTS), model.encode(TEXTS, prompt_name="query")]
        rows.append(pooling_row(name, kind, encoder, np.concatenate(found)))
    assert all(row.count("1 −") == 2 for row in rows)
    check_rows(TABLE, f"| {name} |", rows)


def test_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from llm2vec_ds.export.gguf.file import plan, write
    from llm2vec_ds.export.gguf.llama_cpp import ask
    from llm2vec_ds.export.gguf.tensors import STORAGES

    name, rows = f"llama.cpp, xllamacpp {version('xllamacpp')}", []
    for kind, encoder in encoders():
        try:
            planned = plan(encoder, STORAGES["f32"])
        except UserError:
            rows.append(named_row(name, kind, encoder, "refused", "refused"))
            continue
        write(tmp_path / "e.gguf", encoder, planned, {"name": "tiny"})
        found = ask(tmp_path / "e.gguf", [*TEXTS, *(asked(encoder, text) for text in TEXTS)], 512)
        rows.append(pooling_row(name, kind, encoder, found.vectors, largest=2e-3))
    assert [row for row in rows if "refused" in row] == rows[-2:]
    assert all(row.count("1 −") == 2 for row in rows[:-2])
    check_rows(TABLE, f"| {name} |", rows)
