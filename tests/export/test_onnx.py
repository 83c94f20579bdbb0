"""ONNX graphs give the encoder's vectors in onnxruntime, at every batch size and length."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from llm2vec_ds import Encoder, EncoderSettings, UserError
from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.export.export import ExportOptions
from llm2vec_ds.export.onnx import export as onnx_export
from llm2vec_ds.export.onnx.export import ask, export_onnx
from llm2vec_ds.export.onnx.graph import Graph
from llm2vec_ds.export.onnx.rules import plan_onnx
from tests.support.encoder_folders import make
from tests.support.gguf_encoders import save, trunk
from tests.support.tiny import sentences, tiny_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TEXTS = ["bread", "<s> said </s>", *sentences(5, 1), " ".join(sentences(30, 3))[:1500]]
SAME = 1e-5
"""Largest difference of vectors of length 1."""
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
    "original_max_position_embeddings": 128,
}


def difference(found: np.ndarray, source: Path, texts: list[str] = TEXTS, **how: Any) -> float:
    expected = Encoder.from_pretrained(source, precision="fp32").encode(texts, normalize=True, **how)
    return float(np.abs(found - expected).max())


def test_a_graph_gives_the_vectors_by_the_documents_lines(tmp_path: Path) -> None:
    source = make(tmp_path / "encoder", eos=True, prompts={"query": "Find passages:"})
    notes = export_onnx(source, tmp_path / "out", ExportOptions())
    lines = re.search(r"^```python onnx\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert lines is not None
    names: dict[str, Any] = {}
    exec(lines[1].replace("runs/exported_onnx", str(tmp_path / "out")), names)
    embed = names["embed"]
    together, alone = embed(TEXTS), np.concatenate([embed([text]) for text in TEXTS])
    assert difference(together, source) < SAME
    assert np.abs(together - alone).max() < SAME
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert {"onnx/model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json"} < found
    assert not [name for name in found if name.endswith((".safetensors", ".onnx_data"))]
    assert str(Path.cwd()).encode() not in (tmp_path / "out" / "onnx" / "model.onnx").read_bytes()
    said = [
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    ]
    assert said[0]["transformers.js_config"] == {"dtype": "fp32"}
    assert said[1]["model_max_length"] == 512
    assert any("also pools the instruction" in note and "'query'" in note for note in notes)


@pytest.mark.parametrize("pooled_tokens", ["text", "all"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "eos", "bos"])
def test_the_graph_pools_as_the_encoder_does(pooling: str, pooled_tokens: str) -> None:
    """In torch, with padding after the texts and before them."""
    import torch

    is_bare = pooling in ("last", "weighted_mean") and pooled_tokens == "text"
    settings = EncoderSettings(pooling=pooling, pooled_tokens=pooled_tokens)
    encoder = Encoder(trunk("llama"), tiny_tokenizer(bos=not is_bare), settings)
    expected = encoder.encode(TEXTS, normalize=True)
    ids = [encoder.tokenizer(text)["input_ids"] for text in TEXTS]
    ids = [one + [1] * (pooling == "eos" and one[-1] != 1) for one in ids]
    graph = Graph(trunk("llama"), plan_onnx(encoder).pooled)
    longest = max(map(len, ids))
    for before in (False, True):
        padded, mask = torch.full((2, len(ids), longest), 2), torch.zeros(len(ids), longest, dtype=torch.long)
        for i, one in enumerate(ids):
            place = slice(longest - len(one), None) if before else slice(len(one))
            padded[0, i, place], mask[i, place] = torch.tensor(one), 1
        with torch.no_grad():
            found = graph(padded[0], mask)[1].numpy()
        assert np.abs(found - expected).max() < SAME


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"template": "Text: {text}"}, "leaves the template's tokens out of the vector"),
    ({"kind": "phi3", **LONGROPE}, {}, "the RoPE of this phi3 changes beyond 128 tokens"),
    ({"is_causal": True}, {}, "this one is causal"),
    ({}, {"template": "{text}!", "pooled_tokens": "all"}, "cannot put '{text}!' around a text"),
]


@pytest.mark.parametrize(("of_trunk", "settings", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_graph_cannot_express_is_refused(
    of_trunk: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    changes = {"kind": "llama", **of_trunk}
    encoder = Encoder(trunk(changes.pop("kind"), **changes), tiny_tokenizer(), EncoderSettings(**settings))
    encoder.trunk.config.is_causal = changes.get("is_causal", False)
    with pytest.raises(UserError, match=re.escape(said)):
        plan_onnx(encoder)


def test_a_rope_that_changes_later_and_a_template_that_is_pooled_are_taken() -> None:
    settings = EncoderSettings(max_tokens=128, pooled_tokens="all", template="Text: {text}")
    encoder = Encoder(trunk("phi3", **LONGROPE), tiny_tokenizer(), settings)
    assert any("give 'Text: ' + text" in note for note in plan_onnx(encoder).notes)


def test_a_wrong_graph_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "encoder")

    def garbage(folder: Path, *_: Any) -> Path:
        (folder / "model.onnx").write_bytes(b"no graph")
        return folder / "model.onnx"

    def others(_: Path, batches: list[list[str]], __: int) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(sum(map(len, batches)), 64))

    monkeypatch.setattr(onnx_export, "write_file", garbage)
    with pytest.raises(UserError, match="onnxruntime failed on model.onnx: "):
        export_onnx(source, tmp_path / "out", ExportOptions())
    monkeypatch.setattr(onnx_export, "ask", others)
    with pytest.raises(UserError, match="onnxruntime does not give the encoder's vectors"):
        export_onnx(source, tmp_path / "out", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_of_others_and_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "encoder")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    for name, options, said in [
        ("thesis", ExportOptions(overwrite=True), "holds files, but no encoder or export of this toolkit"),
        (
            "out",
            ExportOptions("bf16"),
            "'bf16' is not supported by --format onnx: choose auto, fp32, fp16, int8",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            export_onnx(source, tmp_path / name, options)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), [("qwen3", "eos"), ("gemma3_text", "mean")])
def test_other_types_give_the_vectors_behind_a_template(kind: str, pooling: str, tmp_path: Path) -> None:
    source = save(tmp_path / "encoder", kind, pooling=pooling, pooled_tokens="all", template="Text: {text}")
    export_onnx(source, tmp_path / "out", ExportOptions())
    texts = TEXTS[2:]
    sent = [f"Text: {text}" for text in texts]
    found = ask(tmp_path / "out" / "onnx" / "model.onnx", [sent[:1], sent[1:]], 512)
    assert difference(found, source, texts) < SAME


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [("fp16", "model_fp16.onnx"), ("int8", "model_quantized.onnx")])
def test_weights_may_be_rounded_and_lie_apart(
    dtype: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec_ds.export.onnx.file.LARGEST_FILE", 1000)
    source = save(tmp_path / "encoder")
    export_onnx(source, tmp_path / "out", ExportOptions(dtype))
    files = {path.name for path in (tmp_path / "out" / "onnx").iterdir()}
    assert files == {name, f"{name}_data"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {name: True}
    assert 1e-5 < difference(ask(tmp_path / "out" / "onnx" / name, [TEXTS], 512), source) < 0.1


@pytest.mark.slow
def test_a_type_that_torch_cannot_trace_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "encoder", "mixtral", changes={"num_local_experts": 4, "sliding_window": None})
    with pytest.raises(UserError, match="torch.onnx cannot trace model type 'mixtral'"):
        export_onnx(source, tmp_path / "out", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    Encoder.from_pretrained(demo_model_dir(), causal=False, precision="fp32").save(tmp_path / "encoder")
    export_onnx(tmp_path / "encoder", tmp_path / "out", ExportOptions())
    pairs = own_graded_pairs()
    texts = pairs.second[:100]
    found = ask(tmp_path / "out" / "onnx" / "model.onnx", [texts[:50], texts[50:]], 512)
    largest = difference(found, tmp_path / "encoder", texts)
    print(f"largest difference: {largest:.1e}, {len(texts)} texts")
    assert largest < 1e-4
