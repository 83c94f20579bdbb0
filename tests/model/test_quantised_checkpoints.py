"""Checkpoints that are stored in few bits are read whole, trained as an NF4 base, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm2vec_ds import Encoder, UserError
from llm2vec_ds.engine.run import train
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.model.quantization import dequantized, is_quantized
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import recipe

STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as others upload them, the rest in bf16."""
    folder = tmp_path_factory.mktemp("stored")
    for name, settings in STORED.items():
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, quantization_config=config, dtype=torch.bfloat16
        )
        model.save_pretrained(folder / name)
        for file in tiny_model_dir.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    return folder


@pytest.mark.parametrize("name", STORED)
def test_read_whole_and_saved_whole(name: str, stored: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(stored / name)
    original = Encoder.from_pretrained(tiny_model_dir)
    for (key, value), (_, exact) in zip(
        encoder.trunk.state_dict().items(), original.trunk.state_dict().items(), strict=True
    ):
        assert value.dtype == torch.float32
        assert 0 <= (value - exact).norm() < 0.5 * exact.norm(), key
    encoder.save(tmp_path / "saved")
    assert {value.dtype for value in load_file(tmp_path / "saved" / "model.safetensors").values()} == {
        torch.float32
    }
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    texts = ["the river", "a train"]
    assert (Encoder.from_pretrained(tmp_path / "saved").encode(texts) == encoder.encode(texts)).all()


@pytest.mark.parametrize("name", ["nf4", "nf4 twice"])
def test_its_bytes_are_the_base_of_qlora(name: str, stored: Path) -> None:
    whole = load_trunk(str(stored / name), TrunkOptions()).state_dict()
    trunk = load_trunk(str(stored / name), TrunkOptions(quantization="nf4"))
    weights = dict(trunk.named_parameters())
    assert sum(map(is_quantized, weights.values())) == 14
    assert {value.dtype for value in weights.values()} == {torch.float32}  # as ZeRO wants it
    for key, value in weights.items():
        assert torch.equal(dequantized(value), whole[key])


@pytest.mark.parametrize(
    ("stage", "quantization", "name"), [("mntp", None, "int8"), ("simcse", "nf4", "nf4 twice")]
)
def test_trained_and_written_whole(
    stage: str, quantization: str | None, name: str, stored: Path, texts_file: Path, tmp_path: Path
) -> None:
    still: dict[str, Any] = {"max_steps": 1, "optimizer": {"lr": 1e-12}}
    values = recipe(stage, stored / name, texts_file, tmp_path / "run", **still)
    values["model"]["quantization"] = quantization
    train(parse_recipe(values))
    written = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    for key, value in load_trunk(str(stored / name), TrunkOptions()).state_dict().items():
        torch.testing.assert_close(written[key], value)


@pytest.mark.parametrize(("name", "bits"), [("fp4", "4 bits as fp4"), ("int8", "8 bits")])
def test_what_is_not_nf4_is_no_base_of_qlora(name: str, bits: str, stored: Path) -> None:
    with pytest.raises(UserError, match=f"is in {bits}, .*set model.quantization=null"):
        load_trunk(str(stored / name), TrunkOptions(quantization="nf4"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_other_means_are_refused_by_name(
    method: str, quantization: str | None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=f"quantised by {method}, which cannot be read: use the original model"
    ) as caught:
        load_trunk(str(folder), TrunkOptions(quantization=quantization))
    assert "\n" not in str(caught.value)
