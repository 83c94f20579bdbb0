"""The public class: order, instructions, saving."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llm2vec_ds import Encoder, EncoderSettings
from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.arguments import KNOWN, check_arguments
from llm2vec_ds.encoder.fingerprint import encoder_fingerprint
from llm2vec_ds.encoder.replicas import text_blocks
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.teacher_model import load_teacher
from tests.support.tiny import sentences


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_model_dir)


def test_vectors_come_in_order_whatever_the_micro_batch(encoder: Encoder) -> None:
    texts = sentences(20)
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_an_instruction_is_attended_and_not_pooled(encoder: Encoder) -> None:
    plain = encoder.encode(["the river runs"])
    one, other = (encoder.encode(["the river runs"], instruction=i) for i in ("bread", "rain falls"))
    assert np.abs(one - plain).max() > 1e-4
    assert np.abs(one - other).max() > 1e-4


def test_normalized_vectors_have_length_one(encoder: Encoder) -> None:
    np.testing.assert_allclose(
        np.linalg.norm(encoder.encode(sentences(5), normalize=True), axis=1), 1, atol=1e-6
    )


def test_an_empty_text_is_named(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="text 1 .* is empty"):
        encoder.encode(["bread", " ", ""])


def test_bad_texts_are_named_and_passed_over_if_asked(
    encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["bread", None, "the river runs", ""]
    vectors = np.concatenate(list(encoder.encode_blocks(texts, bad_texts="nan", first_row=10)))
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False, True]
    np.testing.assert_allclose(vectors[2], encoder.encode("the river runs"), atol=1e-6)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "text 11 (counted from 0) is not text",
        "text 13 (counted from 0) is empty",
    ]


def test_any_iterable_is_read_no_further_than_needed(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec_ds.encoder.replicas.TEXTS_PER_BLOCK", 4)
    texts, n_read = sentences(10), 0

    def stream() -> Iterator[str]:
        nonlocal n_read
        for text in texts:
            n_read += 1
            yield text

    blocks = encoder.encode_blocks(stream())
    first = next(blocks)
    assert (len(first), n_read) == (4, 4)
    np.testing.assert_allclose(np.concatenate([first, *blocks]), encoder.encode(texts), atol=1e-6)


def test_few_long_texts_make_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2vec_ds.encoder.replicas.CHARACTERS_PER_BLOCK", 10)
    assert list(text_blocks(["a" * 6, "b" * 6, "c"], 5)) == [(5, ["a" * 6, "b" * 6]), (7, ["c"])]


def test_training_goes_on_after_encoding(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also where RoPE keeps factors for the longest text seen, which encoding has made without autograd."""
    model = AutoModel.from_pretrained(tiny_model_dir)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    model.config.max_position_embeddings = 16
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path)
    texts = ["word " * 30, "a word"]
    expected = encoder.encode(texts)
    batch = pack(list(encoder._tokenized(texts, None, 0, "raise").values()))
    vectors = encoder.train()(batch)
    np.testing.assert_allclose(vectors.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    vectors.sum().backward()
    assert all(p.grad is not None for p in encoder.trunk.layers.parameters())
    assert encoder.encode(texts) is not None
    assert encoder.training


def test_many_tokens_keep_the_memory_that_layers_free(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses: list[bool] = []

    @contextmanager
    def used() -> Iterator[None]:
        uses.append(True)
        yield
        uses.append(False)

    monkeypatch.setattr("llm2vec_ds.encoder.inference.freed_memory_is_kept", used)
    encoder.encode(["a word"])
    assert uses == []
    for _ in encoder.encode_blocks(["a word " * 20] * 200):
        assert uses == [True, False]  # not while the caller has the vectors


def test_several_devices_share_the_work_and_keep_the_order(encoder: Encoder, tiny_model_dir: Path) -> None:
    several = Encoder.from_pretrained(tiny_model_dir, device=["cpu", "cpu"])
    texts = sentences(40)
    np.testing.assert_allclose(several.encode(texts, micro_batch_tokens=1), encoder.encode(texts), atol=1e-5)
    assert several._replicas is not None
    several.train()
    assert several._replicas is None  # copies would not follow the training


def test_prompts_have_names(encoder: Encoder, tmp_path: Path) -> None:
    named = Encoder(encoder.trunk, encoder.tokenizer, EncoderSettings(prompts={"query": "rain falls"}))
    named.save(tmp_path / "encoder")
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    expected = encoder.encode(["bread"], instruction="rain falls")
    np.testing.assert_allclose(loaded.encode(["bread"], prompt_name="query"), expected, atol=1e-6)
    with pytest.raises(UserError, match="'document' is unknown; this encoder's prompts: query"):
        loaded.encode(["bread"], prompt_name="document")


def test_vectors_may_be_cut_and_come_as_tensors(encoder: Encoder) -> None:
    whole, cut = (encoder.encode(sentences(3), truncate_dim=n, normalize=bool(n)) for n in (None, 8))
    np.testing.assert_allclose(
        cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6
    )
    tensor = encoder.encode(sentences(3), convert_to_tensor=True)
    assert tensor.shape == whole.shape
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, "Encoder.encode has no argument 'batch_size': use micro_batch_tokens"),
        ({"normalize_embeddings": True}, "no argument 'normalize_embeddings': use normalize"),
        ({"pool": 1}, "no argument 'pool': it has instruction, prompt_name, "),
    ],
)
def test_arguments_of_others_are_answered(encoder: Encoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encoder.encode(["one"], **options)  # type: ignore[call-overload]


def test_every_argument_is_known() -> None:
    assert list(inspect.signature(Encoder.encode_blocks).parameters)[2:] == list(KNOWN)
    with pytest.raises(TypeError, match="not None"):
        check_arguments(None, {})


def test_similarity_is_the_cosine(encoder: Encoder) -> None:
    vectors = encoder.encode(sentences(3)).astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    expected = vectors @ vectors[:2].T / np.outer(lengths, lengths[:2])
    np.testing.assert_allclose(encoder.similarity(vectors, vectors[:2]), expected, atol=1e-6)


def test_saved_and_loaded_is_the_same_and_bidirectional(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    np.testing.assert_array_equal(loaded.encode(sentences(5)), encoder.encode(sentences(5)))
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["is_causal"] is False
    assert config["architectures"] == ["LlamaModel"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]


def test_saving_deletes_nothing_of_others(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "models" / "other").mkdir(parents=True)
    (tmp_path / "models" / "other" / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match="encoder .*models holds files, but no encoder or export"):
        encoder.save(tmp_path / "models")
    assert (tmp_path / "models" / "other" / "model.safetensors").read_text() == "precious"
    encoder.save(tmp_path / "encoder")
    (tmp_path / "encoder" / "notes.txt").write_text("precious")
    Encoder.from_pretrained(tmp_path / "encoder").save(tmp_path / "encoder")  # over what it was read from
    assert (tmp_path / "encoder" / "notes.txt").read_text() == "precious"
    again = Encoder.from_pretrained(tmp_path / "encoder")
    np.testing.assert_array_equal(again.encode(sentences(5)), encoder.encode(sentences(5)))


def test_home_is_a_tilde(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    encoder.save("~/encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    Encoder.from_pretrained("~/encoder")


def test_an_encoder_of_the_hub_has_its_settings(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache on this machine stands in for the hub."""
    settings = {"pooling": "last", "max_tokens": 7, "prompts": {"query": "Find bread:"}}
    own = Encoder(encoder.trunk, encoder.tokenizer, EncoderSettings(**settings))
    repository = tmp_path / "models--team--small"
    own.save(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = Encoder.from_pretrained("team/small")
    assert found.settings == own.settings
    texts = sentences(4)
    expected = own.encode(texts, prompt_name="query")
    np.testing.assert_allclose(found.encode(texts, prompt_name="query"), expected, atol=1e-6)
    teach = load_teacher("team/small", "distil.teacher", "Find bread:", torch.device("cpu"))
    np.testing.assert_allclose(teach(texts), expected, atol=1e-6)
    assert encoder_fingerprint("team/small") == encoder_fingerprint(str(repository / "snapshots" / "abc"))


def test_settings_of_sentence_transformers_are_not_passed_over_in_silence(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder.save(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[]")
    Encoder.from_pretrained(tmp_path / "model")
    assert "is a model of sentence-transformers" not in caplog.text
    (tmp_path / "model" / "llm2vec_ds.json").unlink()
    Encoder.from_pretrained(tmp_path / "model")
    assert "is a model of sentence-transformers. It is read as an LLM here" in caplog.text


def test_stock_transformers_gives_the_same_vectors(encoder: Encoder, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder.save(tmp_path / "encoder")
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "encoder")("the river runs", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        vector = model(ids).last_hidden_state[0, 1:].mean(0)
    np.testing.assert_allclose(encoder.encode(["the river runs"])[0], vector.numpy(), atol=1e-5)


@pytest.mark.parametrize("path", ["no/such/folder", "none"])
def test_a_missing_model_is_one_line(path: str) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        Encoder.from_pretrained(path)
    assert "\n" not in str(caught.value)
