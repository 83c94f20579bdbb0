"""Exports load elsewhere and give the encoder's vectors; what cannot be expressed is said or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2vec_ds import Encoder, EncoderSettings, UserError
from llm2vec_ds.demo import model as demo_model
from llm2vec_ds.export.card import licence, origin
from llm2vec_ds.export.export import ExportOptions, export
from llm2vec_ds.export.gguf.export import export_gguf
from llm2vec_ds.export.onnx.export import export_onnx
from llm2vec_ds.model.pooling import POOLINGS
from tests.support.encoder_folders import TEXTS, cosines, make
from tests.support.model_types import build
from tests.support.tiny import tiny_llama, tiny_tokenizer

INSTRUCTION = "Given rain, find bread:"


def sentence_transformer(folder: Path, **options: Any) -> Any:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


ENCODERS = {
    "plain": {},
    "bos": {"bos": True},
    "bos and eos": {"bos": True, "eos": True},
    "all tokens": {"bos": True, "pooled_tokens": "all"},
    "weighted": {"pooling": "weighted_mean"},
    "weighted, all": {"bos": True, "pooling": "weighted_mean", "pooled_tokens": "all"},
    "last": {"bos": True, "pooling": "last"},
    "eos pooling": {"bos": True, "pooling": "eos"},
    "bos pooling": {"bos": True, "pooling": "bos"},
    "head": {"template": "Text:{text}"},
    "no padding token": {"bos": True, "pad": False},
    "short": {"bos": True, "max_tokens": 16},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_sentence_transformers_gives_the_vectors(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "encoder", **ENCODERS[name])
    export(source, tmp_path / "out", ExportOptions())
    expected = Encoder.from_pretrained(source).encode(TEXTS)
    model = sentence_transformer(tmp_path / "out")
    for batch_size in (1, 32):
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=batch_size), expected, atol=2e-5)
    own = Encoder.from_pretrained(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(own, expected, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"bos": True}, {"bos": True, "pooled_tokens": "all"}], ids=str)
@pytest.mark.parametrize(
    "template", ["{instruction} {text}", "{instruction}{text}", "Do: {instruction}\n{text}"]
)
def test_prompts_have_names_there_too(settings: dict[str, Any], template: str, tmp_path: Path) -> None:
    source = make(tmp_path / "encoder", template=template, prompts={"query": INSTRUCTION}, **settings)
    export(source, tmp_path / "out", ExportOptions(prompts={"other": "fish"}))
    expected = Encoder.from_pretrained(source).encode(TEXTS, instruction=INSTRUCTION)
    model = sentence_transformer(tmp_path / "out")
    words = np.array(
        [not text[0].isdigit() for text in TEXTS]
    )  # a blank before a digit is a token of its own
    assert cosines(model.encode(TEXTS, prompt_name="query"), expected)[words].min() > 0.9999
    assert set(model.prompts) >= {"query", "other"}
    assert cosines(model.encode(TEXTS), expected).min() < 0.999


def test_a_prompt_may_be_empty_or_have_the_name_of_the_default(tmp_path: Path) -> None:
    """The template's beginning then gets another name."""
    empty = make(tmp_path / "empty", prompts={"query": INSTRUCTION, "document": ""})
    export(empty, tmp_path / "out", ExportOptions())
    expected = Encoder.from_pretrained(empty).encode(TEXTS)
    model = sentence_transformer(tmp_path / "out")
    assert cosines(model.encode(TEXTS, prompt_name="document"), expected).min() > 0.9999
    headed = make(tmp_path / "headed", template="Text: {instruction} {text}", prompts={"document": "fish"})
    export(headed, tmp_path / "headed_out", ExportOptions())
    model, encoder = sentence_transformer(tmp_path / "headed_out"), Encoder.from_pretrained(headed)
    assert model.default_prompt_name == "text"
    words = np.array([not text[0].isdigit() for text in TEXTS])
    for name, own in ((None, {}), ("document", {"prompt_name": "document"})):
        found, expected = model.encode(TEXTS, prompt_name=name), encoder.encode(TEXTS, **own)
        assert cosines(found, expected)[words].min() > 0.9999


def test_a_padding_token_without_embedding_is_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "encoder")
    encoder = Encoder.from_pretrained(source)
    encoder.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert encoder.tokenizer.pad_token_id == encoder.trunk.config.vocab_size
    encoder.save(tmp_path / "padded")
    for format in ("sentence-transformers", "transformers"):
        export(tmp_path / "padded", tmp_path / format, ExportOptions(format=format))
    expected = Encoder.from_pretrained(source).encode(TEXTS)
    found = sentence_transformer(tmp_path / "sentence-transformers").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_texts_that_change_rope_are_a_limit(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    trunk = tiny_llama(max_position_embeddings=1500, rope_parameters=dynamic).model
    trunk.config.is_causal = False
    for n_tokens, limits in ((4096, 1), (1500, 0)):
        folder = tmp_path / f"encoder{n_tokens}"
        Encoder(trunk, tiny_tokenizer(False), EncoderSettings(max_tokens=n_tokens)).save(folder)
        notes = export(folder, tmp_path / f"out{n_tokens}", ExportOptions())
        assert sum("RoPE changes beyond 1500 tokens" in note for note in notes) == limits


def test_matryoshka_lengths_come_through(tmp_path: Path) -> None:
    source = make(tmp_path / "encoder")
    export(source, tmp_path / "out", ExportOptions())
    found = sentence_transformer(tmp_path / "out", truncate_dim=8).encode(TEXTS, normalize_embeddings=True)
    expected = Encoder.from_pretrained(source).encode(TEXTS, truncate_dim=8, normalize=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_stock_transformers_needs_the_folder_alone(tmp_path: Path) -> None:
    """In a process that never imports this package."""
    source = make(tmp_path / "encoder", bos=True)
    export(source, tmp_path / "out", ExportOptions(format="transformers"))
    code = (
        "import sys, torch; from transformers import AutoModel, AutoTokenizer;"
        f"folder, text = {str(tmp_path / 'out')!r}, 'the river runs';"
        "model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder);"
        "hidden = model(**tokenizer([text, 'bread'], padding=True, return_tensors='pt')).last_hidden_state;"
        "n = len(tokenizer(text)['input_ids']);"
        "assert 'llm2vec_ds' not in sys.modules; print(hidden[0, 1:n].mean(0).tolist())"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = Encoder.from_pretrained(source).encode("the river runs")
    np.testing.assert_allclose(json.loads(outcome.stdout), expected, atol=1e-5)
    assert not (tmp_path / "out" / "modules.json").exists()


def test_servers_find_the_keys_that_their_parsers_read(tmp_path: Path) -> None:
    """Read in November 2026. vLLM: vllm/transformers_utils/config.py (get_pooling_config,
    get_sentence_transformer_tokenizer_config). TEI: router/src/lib.rs (ModelConfig, PoolConfig, STConfig) and
    backends/candle/src/models/llama.rs (LLamaConfig).
    """
    export(make(tmp_path / "encoder", pad=False), tmp_path / "out", ExportOptions())
    read = {f: json.loads((tmp_path / "out" / f).read_text()) for f in FILES}
    modules = read["modules.json"]
    (pooling,) = [m for m in modules if m["type"] == "sentence_transformers.models.Pooling"]
    assert pooling["path"] == "1_Pooling"
    assert read["sentence_bert_config.json"] == {"max_seq_length": 512, "do_lower_case": False}
    true = [key for key, value in read["1_Pooling/config.json"].items() if value is True]
    assert true == ["pooling_mode_mean_tokens", "include_prompt"]
    assert read["1_Pooling/config.json"]["pooling_mode"] == "mean"
    for mode in (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    ):
        assert isinstance(read["1_Pooling/config.json"][f"pooling_mode_{mode}"], bool)
    config = read["config.json"]
    assert config["architectures"] == ["LlamaModel"]
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (False, True)
    assert isinstance(config["pad_token_id"], int)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    needed = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    )
    needed += "hidden_act max_position_embeddings initializer_range rms_norm_eps model_type head_dim"
    assert not [key for key in needed.split() if config.get(key) is None]
    assert "auto_map" not in config
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044
    assert not list((tmp_path / "out").glob("*.py"))
    assert read["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"


FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "config.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
)


def test_gemma_3_says_it_by_its_own_flag_alone(tmp_path: Path) -> None:
    encoder = Encoder(build("gemma3_text").base_model, tiny_tokenizer())
    encoder.save(tmp_path / "encoder")
    export(tmp_path / "encoder", tmp_path / "out", ExportOptions())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_bidirectional_attention"] is True
    assert "is_causal" not in config


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_may_be_rounded(dtype: str, stored: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = make(tmp_path / "encoder", bos=True)
    export(source, tmp_path / "out", ExportOptions(dtype=dtype))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {stored}
    assert not [name for name in weights if name.startswith(("model.", "lm_head"))]


def test_a_wrong_folder_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "encoder")

    def forget(folder: Path, *_: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "is_causal": True}))

    monkeypatch.setattr("llm2vec_ds.export.export.write_config", forget)
    with pytest.raises(
        UserError, match=r"AutoModel does not give the encoder's vectors .* nothing was exported"
    ):
        export(source, tmp_path / "out", ExportOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"bos": True}, ["also pool the tokenizer's special tokens", "flatten"]),
        ({"prompts": {"query": "x"}}, ["also pool the instruction"]),
        ({"bos": True, "prompts": {"query": "x"}, "pooled_tokens": "all"}, []),
        ({"pooling": "weighted_mean"}, ["do not support weighted_mean"]),
        ({"template": "Text: {text}", "pooled_tokens": "all"}, ["needs 'Text: ' before each text"]),
        ({"bos": True, "prompts": {"query": "x"}, "pooling": "last"}, []),
    ],
    ids=str,
)
def test_what_readers_cannot_express_is_said_and_written(
    settings: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    told = export(make(tmp_path / "encoder", **settings), tmp_path / "out", ExportOptions())
    assert len(told) == len(said)
    assert all(part in sentence for part, sentence in zip(said, told, strict=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(sentence in card for sentence in told)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "{text} end"}, "cannot put '{text} end' around a text: use --format transformers"),
        ({"bos": True, "special_tokens": False}, "cannot leave out the tokenizer's special tokens"),
        ({"text_span": "upstream"}, "does not support text_span='upstream'"),
        ({"bos": True, "pooling": "weighted_mean"}, "weights tokens by their place"),
        ({"bos": True, "eos": True, "pooling": "last"}, "tokens that this tokenizer adds at the end"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = make(tmp_path / "encoder", **settings)
    with pytest.raises(UserError, match=said):
        export(source, tmp_path / "out", ExportOptions())
    export(source, tmp_path / "out", ExportOptions(format="transformers"))


@pytest.mark.parametrize(
    ("write", "name"), [(export, "folder"), (export_onnx, "folder"), (export_gguf, "file.gguf")]
)
def test_a_pooling_that_a_format_does_not_know_is_refused(
    write: Callable[..., Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLINGS, "first_and_last", POOLINGS["mean"])
    source = make(tmp_path / "encoder", pooling="first_and_last")
    with pytest.raises(UserError, match="no pooling 'first_and_last': use --format"):
        write(source, tmp_path / name, ExportOptions())


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "encoder")
    (tmp_path / "there").mkdir()
    for output, options, said in [
        ("out", ExportOptions(format="onnx"), "--format 'onnx' is unknown"),
        ("out", ExportOptions(dtype="fp8"), "--dtype 'fp8' is unknown"),
        ("there", ExportOptions(), "exists: choose another"),
    ]:
        with pytest.raises(UserError, match=said):
            export(source, tmp_path / output, options)
    with pytest.raises(UserError, match="holds no encoder"):
        export(tmp_path / "there", tmp_path / "out", ExportOptions())
    export(source, tmp_path / "there", replace(ExportOptions(), overwrite=True))


def test_overwrite_never_deletes_what_export_did_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path / "run" / "encoder")
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to("docs")
    before = sorted(tmp_path.rglob("*"))
    options = ExportOptions(overwrite=True)
    for output, said in {
        "run": "run holds .*run, which is an input",
        "run/encoder": "encoder holds .*encoder, which is an input",
        "run/..": "is or holds the folder you are in",
        ".": "is or holds the folder you are in",
        "docs": "docs holds files, but no encoder or export of this toolkit",
        "link": "link holds files, but no encoder or export of this toolkit",
    }.items():
        with pytest.raises(UserError, match=said):
            export(source.parent, Path(output), options)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_an_export_and_keeps_what_lies_beside_it(tmp_path: Path) -> None:
    source = make(tmp_path / "encoder")
    export(source, tmp_path / "out", ExportOptions())
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="out exists: choose another, or give --overwrite"):
        export(source, tmp_path / "out", ExportOptions())
    export(source, tmp_path / "out", ExportOptions(format="transformers", overwrite=True))
    assert not (tmp_path / "out" / "modules.json").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "out"]


def write_run(folder: Path, stage: str, model: str) -> None:
    folder.mkdir(parents=True)
    recipe = {"stage": stage, "model": {"path": model}, "data": {"path": "private/texts.txt"}, "max_steps": 5}
    recipe |= {"batch": {"global_batch_size": 8}, "optimizer": {"lr": 1e-4}, "seed": 1}
    recipe |= {"adapter": {"rank": 4, "alpha": 8}, "output_dir": str(folder)}
    recipe |= {"distil": {"teacher": model}} if stage == "distil" else {}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text(json.dumps({"n_tokens": 1000, "step_ms": 500.0}) + "\n")


@pytest.mark.parametrize("last", ["simcse", "distil"])
def test_the_card_tells_stages_scores_and_licence(tmp_path: Path, last: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama2\n---\nA model.\n")
    (base / "LICENSE.txt").write_text("terms")
    write_run(tmp_path / "demo" / "mntp", "mntp", str(base))
    for stage in ("simcse", "distil"):  # one of them is left from an earlier, stopped demo
        write_run(tmp_path / "demo" / stage, stage, "demo/mntp/encoder")  # relative to where it was started
    make(tmp_path / "demo" / "mntp" / "encoder")
    make(tmp_path / "demo" / "encoder")
    scores = {name: {"sts_spearman": 0.25} for name in ("causal", "mntp")} | {last: {"sts_spearman": 0.5}}
    scores["run"] = {"sts": "pairs.csv"}
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps(scores))
    make(tmp_path / "demo" / "mine")
    assert origin(tmp_path / "demo" / "mine").stages == ()  # of others, beside the runs
    for source in ("demo", "demo/encoder"):
        assert [recipe.stage for recipe, _ in origin(tmp_path / source).stages] == ["mntp", last]
    export(tmp_path / "demo", tmp_path / "out", ExportOptions())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "license: llama2\n" in card
    assert "| mntp | texts.txt | 5 × 8 | 0.0001 | LoRA r=4, α=8 | 1,000 | 2,000 |" in card
    assert f"| {last} | 0.5000 |" in card
    assert "private" not in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_the_demos_model_carries_its_licence(tmp_path: Path) -> None:
    demo_model._write_card(tmp_path)
    assert licence(str(tmp_path), None) == "apache-2.0"


def test_an_unknown_licence_is_said_not_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make(tmp_path / "encoder")
    export(source, tmp_path / "out", ExportOptions())
    assert "license: other\n" in (tmp_path / "out" / "README.md").read_text()
    assert "licence: none found" in caplog.text
    export(source, tmp_path / "out2", ExportOptions(licence="apache-2.0"))
    assert "license: apache-2.0\n" in (tmp_path / "out2" / "README.md").read_text()
