"""The public class: order, instructions, saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.errors import UserError
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


def test_saved_and_loaded_is_the_same_and_bidirectional(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    np.testing.assert_array_equal(loaded.encode(sentences(5)), encoder.encode(sentences(5)))
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["is_causal"] is False
    assert config["architectures"] == ["LlamaModel"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]


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
