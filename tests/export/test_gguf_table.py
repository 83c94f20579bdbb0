"""How near llama.cpp comes to an encoder's vectors: docs/serving.md says it, type by type.

`UPDATE_DOCS=1 pytest tests/export/test_gguf_table.py -m slow` writes the table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from llm2vec_ds import Encoder, EncoderSettings
from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.export.export import ExportOptions
from llm2vec_ds.export.gguf.architecture import TYPES
from llm2vec_ds.export.gguf.export import export_gguf
from llm2vec_ds.export.gguf.file import plan, write
from llm2vec_ds.export.gguf.llama_cpp import ask
from llm2vec_ds.export.gguf.rules import POOLING_TYPES
from llm2vec_ds.export.gguf.tensors import STORAGES
from tests.support.gguf_encoders import YARN, trunk
from tests.support.tiny import sentences, tiny_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
POOLINGS = list(POOLING_TYPES)
OTHER_DTYPES = ["f16", "bf16", "q8_0"]
COLUMNS = [*(f"`{pooling}`" for pooling in POOLINGS), *(f"`mean`, {dtype}" for dtype in OTHER_DTYPES)]
HEAD = f"| tiny random | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|\n"
TEXTS = ["bread", *sentences(8, 1), " ".join(sentences(30, 3))[:1500]]
LARGEST = {"f32": 2e-3, "f16": 2e-2, "bf16": 5e-2, "q8_0": 1e-1}

pytestmark = pytest.mark.slow


def difference(encoder: Encoder, folder: Path, dtype: str = "f32") -> float:
    """Largest of any number of any vector of length 1."""
    write(folder / "e.gguf", encoder, plan(encoder, STORAGES[dtype]), {"name": "tiny"})
    found = ask(folder / "e.gguf", TEXTS, 512).vectors
    return float(np.abs(found - encoder.encode(TEXTS, normalize=True)).max())


def tiny(kind: str, pooling: str, **changes: Any) -> Encoder:
    """With a token before each text, which is pooled too."""
    settings = EncoderSettings(pooling=pooling, pooled_tokens="all")
    return Encoder(trunk(kind, **changes), tiny_tokenizer(bos=True), settings)


def rows() -> dict[str, list[float]]:
    written = DOCUMENT.read_text().partition(HEAD)[2].partition("\n\n")[0]
    found = re.findall(r"^\| `(.+?)` \| (.+) \|$", written, re.MULTILINE)
    return {kind: [float(cell) for cell in cells.split(" | ")] for kind, cells in found}


def test_the_table_is_true(tmp_path: Path) -> None:
    found = {
        kind: [
            *(difference(tiny(kind, pooling), tmp_path) for pooling in POOLINGS),
            *(difference(tiny(kind, "mean"), tmp_path, dtype) for dtype in OTHER_DTYPES),
        ]
        for kind in TYPES
    }
    limits = [*(LARGEST["f32"] for _ in POOLINGS), *(LARGEST[dtype] for dtype in OTHER_DTYPES)]
    for kind, row in found.items():
        assert all(value < limit for value, limit in zip(row, limits, strict=True)), (kind, row)
    if os.environ.get("UPDATE_DOCS"):
        before, _, after = DOCUMENT.read_text().partition(HEAD)
        lines = "\n".join(
            f"| `{kind}` | {' | '.join(f'{x:.0e}' for x in row)} |" for kind, row in found.items()
        )
        DOCUMENT.write_text(f"{before}{HEAD}{lines}\n\n{after.partition(chr(10) * 2)[2]}")
    written = rows()
    assert list(written) == list(TYPES)
    for kind, row in found.items():  # another processor rounds otherwise
        assert all(value < 4 * cell for value, cell in zip(row, written[kind], strict=True)), (kind, row)


LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 512,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("qwen3", {"rope_parameters": {**LOCAL, "rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic": ("qwen2", {"rope_parameters": {**LOCAL, "rope_type": "dynamic", "factor": 4.0}}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 2048}),
    "partly turned": ("phi3", {"rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5}}),
    "layers of Gemma 3": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": LOCAL,
            }
        },
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "heads of another width": ("mistral", {"head_dim": 32}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_the_vectors(name: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[name]
    assert difference(tiny(kind, "mean", **changes), tmp_path) < (1e-3 if "gemma" in kind else 5e-6)


def test_the_real_model_gives_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M, bidirectional, not trained further."""
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(Path.home() / ".cache" / "llm2vec-ds"))
    Encoder.from_pretrained(demo_model_dir(), causal=False, precision="fp32").save(tmp_path / "encoder")
    encoder = Encoder.from_pretrained(tmp_path / "encoder", precision="fp32")
    texts = own_graded_pairs().first[:40]
    vectors = encoder.encode(texts, normalize=True)
    for dtype, largest in (("f32", 5e-4), ("q8_0", 0.5)):
        export_gguf(tmp_path / "encoder", tmp_path / f"{dtype}.gguf", ExportOptions(dtype))
        found = ask(tmp_path / f"{dtype}.gguf", texts, 512).vectors
        assert np.abs(found - vectors).max() < largest
        assert (found * vectors).sum(axis=1).mean() > 0.98
