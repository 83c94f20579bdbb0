"""GGUF files give the encoder's tokens and vectors in llama.cpp, which is asked in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm2vec_ds import Encoder, EncoderSettings, UserError
from llm2vec_ds.export.export import ExportOptions
from llm2vec_ds.export.gguf.export import TOKENS_OF_ALL_KINDS, export_gguf
from llm2vec_ds.export.gguf.file import plan, write
from llm2vec_ds.export.gguf.llama_cpp import ask
from llm2vec_ds.export.gguf.pre_tokenizer import CUT_AT_MARKS, GPT2, NAMES, Cut, pre_tokenizer_name
from llm2vec_ds.export.gguf.rules import notes_of
from llm2vec_ds.export.gguf.tensors import STORAGES
from llm2vec_ds.export.gguf.tokenizer import vocabulary_of
from tests.support.gguf_encoders import YARN, byte_level_tokenizer, save, sentence_piece_tokenizer, trunk
from tests.support.tiny import sentences, tiny_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TEXTS = ["bread", *sentences(5, 1), " ".join(sentences(30, 3))[:1500]]
SAME, SAME_WITH_GELU = 5e-6, 1e-3
"""Largest difference of vectors of length 1; llama.cpp looks Gemma's GELU up in a table of fp16."""


def difference(found: np.ndarray, source: Path, **how: Any) -> float:
    expected = Encoder.from_pretrained(source, precision="fp32").encode(TEXTS, normalize=True, **how)
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize(("kind", "largest"), [("llama", SAME), ("gemma3_text", SAME_WITH_GELU)])
def test_a_file_gives_the_vectors(kind: str, largest: float, tmp_path: Path) -> None:
    source = save(tmp_path / "encoder", kind)
    export_gguf(source, tmp_path / "e.gguf", ExportOptions())
    found = ask(tmp_path / "e.gguf", TEXTS, 512)
    assert len(found.ids[-1]) > 100  # far beyond the window of Gemma 3's layers
    assert difference(found.vectors, source) < largest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.gguf", "encoder"]


@pytest.mark.parametrize("blank_before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tokens_of_a_sentence_piece_are_the_same(blank_before: bool, tmp_path: Path) -> None:
    tokenizer = sentence_piece_tokenizer(blank_before)
    source = save(tmp_path / "encoder", tokenizer=tokenizer, pooled_tokens="all")
    export_gguf(source, tmp_path / "e.gguf", ExportOptions())
    texts = [*TEXTS, *TOKENS_OF_ALL_KINDS, " blank before"]
    found = ask(tmp_path / "e.gguf", texts, 512)
    assert found.ids == tokenizer(texts)["input_ids"]
    assert found.ids[0][0] == tokenizer.bos_token_id


QUICK_CUTS = ["llama-bpe", "smollm"]


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        pytest.param(cut, name, id=name, marks=[] if name in QUICK_CUTS else pytest.mark.slow)
        for cut, name in NAMES.items()
    ],
)
def test_tokens_are_the_same_however_texts_are_cut(cut: Cut, name: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(cut)
    file = written(Encoder(trunk("llama"), tokenizer), tmp_path)
    texts = [
        *TEXTS,
        *TOKENS_OF_ALL_KINDS,
        "<s> said </s>",
        *([] if name in CUT_AT_MARKS else ["हिन्दी ภาษาไทย"]),
    ]
    assert ask(file, texts, 512).ids == tokenizer(texts)["input_ids"]


def written(encoder: Encoder, folder: Path, dtype: str = "f32") -> Path:
    write(folder / "e.gguf", encoder, plan(encoder, STORAGES[dtype]), {"name": "tiny"})
    return folder / "e.gguf"


def test_the_file_says_what_the_encoder_is(tmp_path: Path) -> None:
    settings = EncoderSettings(pooling="eos", max_tokens=200, prompts={"query": "Find:"})
    encoder = Encoder(trunk("llama"), tiny_tokenizer(), settings)
    planned = plan(encoder, STORAGES["f16"])
    write(tmp_path / "e.gguf", encoder, planned, {"name": "tiny", "license": "mit"})
    reader = GGUFReader(tmp_path / "e.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if field.data}
    arch = "llama-embed"
    for key, value in {
        "general.architecture": arch,
        "general.license": "mit",
        f"{arch}.attention.causal": False,
        f"{arch}.pooling_type": 3,
        f"{arch}.context_length": 512,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eos_token_id": 1,
    }.items():
        assert said[key] == value, key
    assert (
        len(said["tokenizer.ggml.tokens"]) == 600
    )  # rows of the embedding, more than the tokenizer's tokens
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert not any("--ubatch-size" in note for note in planned.notes)
    assert any("Start llama.cpp with --ubatch-size 600" in note for note in notes_of(encoder, 600))
    assert any("for 'query' send 'Find: ' + text" in note for note in planned.notes)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], bool, str]] = [
    ("olmo2", {}, {}, False, "model type 'olmo2' is not known to work in llama.cpp"),
    ("llama", {"hidden_act": "gelu"}, {}, False, "llama with hidden_act='gelu'"),
    ("gemma2", {"query_pre_attn_scalar": 8}, {}, False, "query_pre_attn_scalar=8"),
    (
        "gemma2",
        {"sliding_window": 64},
        {},
        False,
        "allows texts of at most 64 tokens, but this encoder takes",
    ),
    ("mistral", {"sliding_window": 64}, {}, False, "allows texts of at most 64 tokens"),
    (
        "llama",
        {"max_position_embeddings": 100},
        {},
        False,
        "max_position_embeddings allows texts of at most 100",
    ),
    (
        "gemma3_text",
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
        {},
        False,
        "after every fixed number of layers",
    ),
    ("gemma3_text", {"layer_types": ["full_attention"] * 4}, {}, False, "after every fixed number of layers"),
    ("qwen2", {"rope_parameters": YARN}, {}, False, "no factors of RoPE's frequencies for qwen2"),
    ("llama", {}, {"pooling": "weighted_mean"}, False, "no pooling 'weighted_mean'"),
    ("llama", {}, {"text_span": "upstream"}, False, "does not support text_span='upstream'"),
    ("llama", {}, {}, True, "also pools the tokenizer's special tokens"),
    ("llama", {}, {"template": "Text: {text}"}, False, "also pools the template"),
    ("llama", {}, {"template": "{text}!", "pooling": "last"}, False, "also pools the template"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "bos", "said"), REFUSED, ids=lambda value: str(value)[:40]
)
def test_what_llama_cpp_cannot_express_is_refused(
    kind: str, changes: dict[str, Any], settings: dict[str, Any], bos: bool, said: str
) -> None:
    encoder = Encoder(trunk(kind, **changes), tiny_tokenizer(bos), EncoderSettings(**settings))
    with pytest.raises(UserError, match=said):
        plan(encoder, STORAGES["f32"])


def test_a_causal_encoder_and_rows_that_do_not_fit_are_refused() -> None:
    encoder = Encoder(trunk("llama", intermediate_size=80), tiny_tokenizer(False))
    with pytest.raises(UserError, match=r"rows of layers.0.mlp.down_proj.weight have 80 numbers"):
        plan(encoder, STORAGES["q8_0"])
    encoder.trunk.config.is_causal = True
    with pytest.raises(UserError, match="this one is causal"):
        plan(encoder, STORAGES["f32"])


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        {**BYTE_LEVEL, "add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, BYTE_LEVEL]},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]},
    ],
    ids=str,
)
def test_an_unknown_way_of_cutting_is_refused(pre_tokenizer: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="llama.cpp has no known name for a tokenizer that splits texts by"):
        pre_tokenizer_name({"model": {"type": "BPE"}, "pre_tokenizer": pre_tokenizer})


def test_merges_that_no_scores_can_say_are_refused() -> None:
    said = json.loads(sentence_piece_tokenizer(True).backend_tokenizer.to_str())
    said["model"]["merges"] = [
        pair for pair in said["model"]["merges"] if len("".join(pair)) < 4 or len(pair[0]) == 1
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)))
    with pytest.raises(UserError, match="llama.cpp would merge .* which this tokenizer never does"):
        vocabulary_of(tokenizer, 600, special_tokens=False, end_with_eos=False)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (
            "tensors._reordered",
            lambda value, *_: value,
            "does not give the encoder's vectors",
        ),
        ("tokenizer.pre_tokenizer_name", lambda _: "smollm", "gives other tokens than the encoder for"),
        ("file.head_dim", lambda _: 8, "llama.cpp failed on .e.gguf.new"),
    ],
    ids=["rows not reordered", "another way of cutting", "a shape that does not fit"],
)
def test_a_wrong_file_is_not_exported(
    place: str, wrong: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "encoder", tokenizer=byte_level_tokenizer(Cut((GPT2,), False)))
    monkeypatch.setattr(f"llm2vec_ds.export.gguf.{place}", wrong)
    with pytest.raises(UserError, match=said):
        export_gguf(source, tmp_path / "e.gguf", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_text_beyond_the_batch_ends_no_process_but_llama_cpps(tmp_path: Path) -> None:
    file = written(Encoder(trunk("llama"), tiny_tokenizer(False)), tmp_path)
    with pytest.raises(UserError, match="llama.cpp failed on e.gguf: "):
        ask(file, TEXTS, 64)


def test_the_command_says_what_to_know_and_replaces_nothing_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec_ds.export.gguf.export.is_installed", lambda: False)
    source, output = save(tmp_path / "encoder"), tmp_path / "e.gguf"
    notes = export_gguf(source, output, ExportOptions("q8_0", "mit", {"query": "Find:"}))
    assert any("do not use prompt 'query' with it" in note for note in notes)
    assert all(note in caplog.text for note in notes)
    assert "not checked with llama.cpp, which is not installed" in caplog.text
    (tmp_path / "thesis.gguf").write_text("precious")
    (tmp_path / "d.gguf").mkdir()
    for name, options, said in [
        ("e.gguf", ExportOptions(), "e.gguf exists: choose another, or give --overwrite"),
        ("thesis.gguf", ExportOptions(overwrite=True), "exists and is not a GGUF file"),
        ("out", ExportOptions(), "a GGUF is one file: name it out.gguf"),
        ("d.gguf", ExportOptions(), "is a folder: name a file in it"),
        ("new.gguf", ExportOptions("fp8"), "--dtype 'fp8' is unknown: choose auto, f32"),
    ]:
        with pytest.raises(UserError, match=said):
            export_gguf(source, tmp_path / name, options)
    export_gguf(source, output, ExportOptions("fp32", overwrite=True))
    assert (tmp_path / "thesis.gguf").read_text() == "precious"


def test_the_documents_lines_give_the_vectors(tmp_path: Path) -> None:
    """Through Python and through the server's /v1/embeddings."""
    source = save(tmp_path / "encoder")
    export_gguf(source, tmp_path / "e.gguf", ExportOptions())
    lines = re.search(r"^```python llama.cpp\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert lines is not None
    code = lines[1].replace("encoder.gguf", str(tmp_path / "e.gguf"))
    code = code.replace("server =", "params.cpuparams.n_threads = 1\nserver =")
    code += f"\nprint(json.dumps([embed(text) for text in {TEXTS!r}]))"
    code += f"\nprint(json.dumps([asked(text) for text in {TEXTS!r}]))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line in outcome.stdout.splitlines()[-2:]:
        assert difference(np.array(json.loads(line)), source) < SAME
