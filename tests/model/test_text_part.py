"""Of a checkpoint that also sees images, the language model alone is loaded, trained and saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForImageTextToText

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.loading import TrunkOptions, load_trunk, load_trunk_and_head
from tests.support.model_types import ALTERNATING, SIZES
from tests.support.runs import command, recipe, trained
from tests.support.tiny import tiny_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 28, "patch_size": 14}
SEEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**SIZES, **ALTERNATING}, "vision_config": {**VISION, **IMAGES}},
    "mistral3": {
        "text_config": {**SIZES, "model_type": "mistral"},
        "vision_config": {**VISION, **IMAGES, "model_type": "pixtral", "head_dim": 16},
    },
    "qwen2_5_vl": {
        "text_config": {**SIZES, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}},
        "vision_config": {**SEEN, "patch_size": 14},
    },
    "qwen3_vl": {
        "text_config": {**SIZES, "rope_parameters": MROPE},
        "vision_config": {**SEEN, "patch_size": 14, "deepstack_visual_indexes": [0]},
    },
}


def save_whole(model_type: str, folder: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WHOLES[model_type])
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", WHOLES)
def test_the_text_model_alone(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = save_whole(model_type, tmp_path / "whole")
    ids = torch.arange(10, 22)
    caplog.set_level(logging.INFO)
    trunk, head = load_trunk_and_head(str(tmp_path / "whole"), TrunkOptions(causal=True))
    batch = pack([TokenizedText(ids.tolist(), 0, len(ids), 0)])
    with torch.no_grad():
        ours = head(Encoder(trunk, tiny_tokenizer()).hidden_states(batch))
        theirs = whole(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    text_type = whole.config.get_text_config().model_type
    assert f"of {model_type}, only the text model {text_type} is used" in caplog.text


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_it_is_bidirectional_and_saved_as_the_text_model(model_type: str, tmp_path: Path) -> None:
    whole = save_whole(model_type, tmp_path / "whole")
    encoder = Encoder.from_pretrained(tmp_path / "whole")
    assert not encoder.causal
    texts = ["the river runs past an old mill", "a train"]
    vectors = encoder.encode(texts)
    encoder.save(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["model_type"] == whole.config.get_text_config().model_type
    assert "vision_config" not in config
    again = Encoder.from_pretrained(tmp_path / "text")
    assert not again.causal
    torch.testing.assert_close(torch.tensor(again.encode(texts)), torch.tensor(vectors), rtol=0, atol=0)


def test_a_whole_without_a_text_model_of_its_own_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("kosmos-2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'kosmos-2' cannot be an encoder: transformers has no class for its"):
        load_trunk(str(tmp_path), TrunkOptions())


def test_a_type_without_a_trunk_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("trocr").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'trocr' cannot be an encoder: .* no class for it without a head"):
        load_trunk(str(tmp_path), TrunkOptions())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_it_is_trained_and_exported(model_type: str, texts_file: Path, tmp_path: Path) -> None:
    save_whole(model_type, tmp_path / "whole")
    values = recipe("simcse", tmp_path / "whole", texts_file, tmp_path / "run", max_steps=2)
    trained(values)
    done = command(["export", str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    assert done.returncode == 0, done.stderr
    texts = ["the river runs past an old mill", "a train"]
    theirs = SentenceTransformer(str(tmp_path / "exported"), device="cpu").encode(texts)
    ours = Encoder.from_pretrained(tmp_path / "run" / "encoder").encode(texts)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    untrained = Encoder.from_pretrained(tmp_path / "whole").encode(texts)
    assert np.abs(ours - untrained).max() > 1e-4
