"""vLLM's server, started and asked by the lines of docs/serving.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.export.export import ExportOptions, export
from tests.support.ports import free_port
from tests.support.served_encoders import (
    INSTRUCTION,
    ROUNDING,
    TEXTS,
    asked,
    difference,
    exported,
    lines_of,
    same_order,
    tiny_encoder,
)
from tests.support.servers import serving
from tests.support.vllm_jobs import vllm_environment

pytestmark = pytest.mark.slow

Embed = Callable[..., list[list[float]]]


@contextmanager
def served(vllm: Path, folder: Path) -> Iterator[Embed]:
    """The document's `embed`, of a server started as the document says."""
    port = free_port()

    def here(lines: str) -> str:
        return lines.replace("runs/exported", str(folder)).replace("8000", str(port))

    names: dict[str, Any] = {}
    exec(here(lines_of("python vllm")), names)
    environment = vllm_environment(vllm)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        del environment[name]
    command = ["bash", "-euc", here(lines_of("bash vllm"))]
    with serving(command, environment, folder.with_suffix(".log"), port):
        yield names["embed"]


def test_the_documents_lines_give_the_vectors(vllm: Path, tmp_path: Path) -> None:
    encoder = tiny_encoder("llama")
    recipe = {"stage": "simcse", "model": {"path": "base"}, "data": {"path": "x.txt"}, "max_steps": 1}
    recipe |= {"batch": {"global_batch_size": 4}, "simcse": {"matryoshka_dims": [32, 64, 128]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output_dir": "simcse"}))
    folder = exported(encoder, tmp_path)
    with served(vllm, folder) as embed:
        assert difference(np.array(embed(TEXTS)), encoder.encode(TEXTS)).largest < ROUNDING
        sent = [asked(encoder, text) for text in TEXTS]
        expected = encoder.encode(TEXTS, instruction=INSTRUCTION)
        assert difference(np.array(embed(sent)), expected).largest < ROUNDING
        short = np.array(embed(TEXTS, dimensions=32))
        assert np.abs(short - encoder.encode(TEXTS, truncate_dim=32, normalize=True)).max() < ROUNDING
        with pytest.raises(OSError, match="400"):
            embed(TEXTS, dimensions=33)
        long = " ".join(TEXTS * 10)
        with pytest.raises(OSError, match="400"):
            embed([long])
        cut = np.array(embed([long], truncate_prompt_tokens=-1))
        assert difference(cut, encoder.encode([long])).largest < ROUNDING


def test_the_real_model(vllm: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, bidirectional, not trained further: vectors, and the order of pairs."""
    Encoder.from_pretrained(demo_model_dir(), causal=False, precision="fp32").save(tmp_path / "encoder")
    export(tmp_path / "encoder", tmp_path / "out", ExportOptions())
    encoder = Encoder.from_pretrained(tmp_path / "encoder", precision="fp32")
    pairs = own_graded_pairs()
    texts = [*pairs.first[:60], *pairs.second[:60]]
    with served(vllm, tmp_path / "out") as embed:
        found = np.array(embed(texts))
    expected = encoder.encode(texts, normalize=True)
    print(f"largest difference {np.abs(found - expected).max():.1e}, {difference(found, expected)}")
    assert difference(found, expected).cosine > 0.9999
    assert same_order(*((x[:60] * x[60:]).sum(axis=1) for x in (found, expected)))
