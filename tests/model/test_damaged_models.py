"""Damaged files of a model, an encoder or an adapter: named in one line, and never used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llm2vec_ds import Encoder, UserError
from llm2vec_ds.data.tagged import TaggedSentence
from llm2vec_ds.evaluate.word_features import word_features
from llm2vec_ds.model.adapter_stack import read_stack
from tests.support.damage import JSON_DAMAGE, Damage, changed, damage, save_nan_llama
from tests.support.tiny import save_tiny_llama, tiny_llama, tiny_tokenizer

NAN_WEIGHT = (
    "the model's weight layers.1.mlp.up_proj.weight is not finite: get the model from its source again"
)


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's folder, undamaged."""
    folder = tmp_path_factory.mktemp("whole") / "encoder"
    Encoder.from_pretrained(tiny_model_dir).save(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "encoder"))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Encoder.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("how", JSON_DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "llm2vec_ds.json", "llm2vec_config.json"],
)
def test_a_damaged_json_file_is_named(name: str, how: str, folder: Path) -> None:
    if name == "llm2vec_config.json":
        (folder / name).write_text('{"pooling_mode": "mean"}')
    file = damage(folder / name, JSON_DAMAGE[how])
    assert re.search(rf"{re.escape(str(file))} is damaged \(.+\): (get|copy) .+ again", refusal(folder))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("llm2vec_ds.json", changed(max_tokens="many"), "`max_tokens`: must be a valid integer"),
        (
            "llm2vec_ds.json",
            changed(max_tokens=0),
            "`max_tokens`: must be greater than or equal to 1",
        ),
        ("llm2vec_ds.json", changed(prompts=["query"]), "`prompts`: must be a valid dictionary"),
        ("llm2vec_ds.json", changed(prompts={"query": 1}), "`prompts.query`: must be a valid string"),
        (
            "llm2vec_ds.json",
            changed(special_tokens="no"),
            "`special_tokens`: must be a valid boolean",
        ),
        ("llm2vec_ds.json", changed(template="none"), "template 'none' must hold {text} once"),
        ("config.json", changed(hidden_size="many"), "'hidden_size' expected int, got str"),
        ("config.json", changed(num_attention_heads=0), "(ZeroDivisionError): check its config.json"),
        ("config.json", changed(num_hidden_layers=-1), "gives it no layer: check num_hidden_layers"),
        ("config.json", changed(is_causal="perhaps"), "says is_causal='perhaps': write true or false"),
        ("tokenizer.json", changed(model=None), "(Exception): check its config.json and tokenizer files"),
        ("tokenizer_config.json", changed(eos_token=[1]), "eos_token has to be either str or AddedToken"),
        ("tokenizer_config.json", changed(model_max_length="x"), "says model_max_length='x': write a number"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(name: str, how: Damage, message: str, folder: Path) -> None:
    damage(folder / name, how)
    assert message in refusal(folder)


def test_settings_that_a_later_version_wrote_are_passed_over(folder: Path) -> None:
    damage(folder / "llm2vec_ds.json", changed(later="value", max_tokens=9))
    assert Encoder.from_pretrained(folder).settings.max_tokens == 9


@pytest.mark.parametrize("how", ["cut off", "empty", "random bytes"])
def test_damaged_weights_are_named(how: str, folder: Path) -> None:
    file = damage(folder / "model.safetensors", JSON_DAMAGE[how])
    assert f"{file} is damaged (" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).dimensions == 32
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing, although model.safetensors.index.json names it" in refusal(tmp_path)


@pytest.fixture
def adapter(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A LoRA adapter of one layer, as peft saves it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers.0.self_attn.q_proj"]}
    config |= {"base_model_name_or_path": str(tiny_model_dir)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.layers.0.self_attn.q_proj"
    weights = {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_a_damaged_adapter_is_named(adapter: Path) -> None:
    assert Encoder.from_pretrained(adapter).dimensions == 32
    damage(adapter / "adapter_config.json", changed(r="many"))
    assert f"adapter {adapter} does not fit LlamaModel: " in refusal(adapter)
    damage(adapter / "adapter_config.json", changed(r=2))
    damage(adapter / "adapter_model.safetensors", JSON_DAMAGE["cut off"])
    assert f"{adapter / 'adapter_model.safetensors'} is damaged (" in refusal(adapter)


@pytest.mark.parametrize("how", JSON_DAMAGE)
def test_a_damaged_description_of_an_adapter_is_named(how: str, adapter: Path) -> None:
    file = damage(adapter / "adapter_config.json", JSON_DAMAGE[how])
    assert f"{file} is damaged (" in refusal(adapter)


@pytest.mark.parametrize("how", JSON_DAMAGE)
def test_a_damaged_stack_of_adapters_is_named(how: str, tmp_path: Path) -> None:
    file = tmp_path / "adapters" / "stack.json"
    file.parent.mkdir()
    file.write_text('{"base": "a/b", "adapters": []}')
    assert read_stack(str(tmp_path), "nf4", None).base == "a/b"
    damage(file, JSON_DAMAGE[how])
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} is damaged \("):
        read_stack(str(tmp_path), "nf4", None)


@pytest.mark.parametrize("bad_texts", ["raise", "nan"])
def test_a_weight_that_is_nan_is_named(bad_texts: Any, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_nan_llama(tmp_path))
    texts = ["", "the river runs"] if bad_texts == "nan" else ["the river runs"]
    message = f"text {len(texts) - 1} (counted from 0) gets no finite vector: {NAN_WEIGHT}"
    with pytest.raises(UserError, match=re.escape(message)):
        encoder.encode(texts, bad_texts=bad_texts)


def test_an_overflow_is_told_from_a_weight_that_is_nan(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_tiny_llama(tmp_path))
    with torch.no_grad():
        encoder.trunk.norm.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"weights are finite, so they overflow in torch\.float32: choose"):
        encoder.encode(["the river runs", "fish"])


def test_word_vectors_are_finite_too(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_nan_llama(tmp_path))
    with pytest.raises(UserError, match="word vectors are not finite: the model's weight layers"):
        word_features(encoder, [TaggedSentence(["the", "river"], ["DET", "NOUN"])])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    said = r"tokenizer has \d+ tokens, the model has embeddings for 200: '.*' … have none: use the tokenizer"
    with pytest.raises(UserError, match=said):
        Encoder.from_pretrained(save_tiny_llama(tmp_path, vocab_size=200))


@pytest.mark.parametrize("special", [False, True])
def test_a_token_was_added_and_the_model_not_resized(
    special: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"], special_tokens=special)
    folder = save_tiny_llama(tmp_path, vocab_size=size)
    tokenizer.save_pretrained(folder)
    if not special:
        with pytest.raises(
            UserError, match=rf"{size + 1} tokens, the model has embeddings for {size}: '<new>'"
        ):
            Encoder.from_pretrained(folder)
        return
    with caplog.at_level("WARNING"):
        encoder = Encoder.from_pretrained(folder)
    assert f"the model has embeddings for {size}: a text with <new> is refused" in caplog.text
    assert encoder.encode(["the river"]).shape[0] == 1
    with pytest.raises(UserError, match=rf"token id {size} is beyond the model's vocabulary of {size}"):
        encoder.encode(["the river <new>"])


def test_a_block_without_a_text(tiny_model_dir: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_model_dir)
    pair: Any = [["Represent:", "the river"]]
    with pytest.raises(UserError, match=r"text 0 \(counted from 0\) is not text"):
        encoder.encode(pair)
    assert np.isnan(encoder.encode([None, *pair], bad_texts="nan")).all()


def test_a_text_beyond_the_learned_positions(tmp_path: Path) -> None:
    """GPT-2 has a row for each position. Models with RoPE compute theirs."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    long = " ".join(["river"] * 80)
    with pytest.raises(UserError, match=r"8\d tokens is longer than the 64 positions .*: set max_tokens"):
        Encoder.from_pretrained(tmp_path).encode([long])
    assert Encoder.from_pretrained(tmp_path, settings={"max_tokens": 64}).encode([long]).shape == (1, 32)
    llama = Encoder.from_pretrained(save_tiny_llama(tmp_path / "llama", max_position_embeddings=64))
    assert np.isfinite(llama.encode([long])).all()
