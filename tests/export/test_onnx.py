"""The lines of docs/serving.md that write an ONNX file: the same vectors, at every batch size and length."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.export.export import ExportOptions, export
from tests.support.encoder_folders import TEXTS, cosines, make

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def test_onnx_gives_the_vectors(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers import AutoTokenizer

    source = make(tmp_path / "encoder", pooled_tokens="all")
    export(source, tmp_path / "out", ExportOptions())
    lines = re.search(r"^```python onnx\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert lines is not None
    exec(lines[1].replace("runs/exported", str(tmp_path / "out")), {"__name__": "lines"})
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = Encoder.from_pretrained(source).encode(TEXTS)
    for batch_size in (1, 32):
        found = []
        for start in range(0, len(TEXTS), batch_size):
            tokens = tokenizer(TEXTS[start : start + batch_size], padding=True, return_tensors="np")
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            (hidden,) = session.run(None, inputs)
            mask = tokens["attention_mask"][..., None]
            found.append((hidden * mask).sum(axis=1) / mask.sum(axis=1))
        assert cosines(np.concatenate(found), expected).min() > 0.9999
