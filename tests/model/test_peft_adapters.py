"""LoRA folders of peft: what peft itself merges is merged alike, trained from, and stacked over NF4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from llm2vec_ds import Encoder, UserError
from llm2vec_ds.engine.run import train
from llm2vec_ds.model.adapter_stack import put_stack_in, read_stack
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.model.peft_adapters import resolve, tokenizer_place
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.runs import NO_DROPOUT, recipe, trained


def adapter(folder: Path, base: Path, auto_class: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    """A folder as peft writes it; B is not zero."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(auto_class.from_pretrained(base), LoraConfig(**{**config, **changes})).save_pretrained(
        folder
    )
    return folder


def merged_by_peft(
    folder: Path, base: Path, auto_class: Any = AutoModelForCausalLM
) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(auto_class.from_pretrained(base), folder).merge_and_unload()
    return {k.removeprefix("model."): v for k, v in model.state_dict().items() if "lm_head" not in k}


@pytest.mark.parametrize(
    ("changes", "n_layers"),
    [
        ({}, 4),
        ({"layers_to_transform": [1]}, 2),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, 3),
        ({"target_modules": r"model\.layers\.1\..*(q|v)_proj"}, 2),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 3}}, 4),
        ({"use_rslora": True}, 4),
        ({"init_lora_weights": "pissa"}, 4),
        ({"auto_class": AutoModel}, 4),
    ],
)
def test_merged_as_peft_merges(
    changes: dict[str, Any], n_layers: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    auto_class = changes.get("auto_class", AutoModelForCausalLM)
    folder = adapter(tmp_path / "a", tiny_model_dir, **changes)
    expected = merged_by_peft(folder, tiny_model_dir, auto_class)
    found = Encoder.from_pretrained(folder).trunk.state_dict()
    base = Encoder.from_pretrained(tiny_model_dir).trunk.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    assert sum(not torch.equal(found[name], base[name]) for name in base) == n_layers


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_replication": [(0, 2), (1, 2)]}, "has layer_replication="),
        ({"alora_invocation_tokens": [5]}, "has alora_invocation_tokens="),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices="),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has weights for lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"is on embed_tokens \(Embedding\)"),
    ],
)
def test_what_would_be_merged_wrongly_is_refused(
    changes: dict[str, Any], said: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", tiny_model_dir, **changes)
    with pytest.raises(UserError, match=said):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("a_key_of_tomorrow", {"x": 1}, "has a_key_of_tomorrow="),
        ("init_lora_weights", "corda", "whose base weights are not known here"),
    ],
)
def test_settings_that_are_not_known_are_refused(
    key: str, value: Any, said: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    file = adapter(tmp_path / "a", tiny_model_dir) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=said):
        Encoder.from_pretrained(tmp_path / "a")


def test_a_folder_that_holds_a_model_and_an_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers would load both, and say nothing."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    shutil.copy(adapter(tmp_path / "a", tiny_model_dir) / "adapter_config.json", folder)
    with pytest.raises(UserError, match=r"holds a whole model \(model.safetensors\) and an adapter"):
        Encoder.from_pretrained(folder)


def values_of(stage: str, tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A run from an adapter whose learning rate is next to nothing."""
    still = {"max_steps": 1, "optimizer": {"lr": 1e-12}}
    folder = adapter(tmp_path / "a", tiny_model_dir, layers_to_transform=[1])
    return recipe(stage, folder, texts_file, tmp_path / "run", **still)


def test_a_run_from_an_adapter(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        train(parse_recipe(values_of("mntp", tiny_model_dir, texts_file, tmp_path)))
    assert f"{tmp_path / 'a'}: LoRA merged into 2 linear layers" in caplog.text
    found = Encoder.from_pretrained(tmp_path / "run" / "encoder").trunk.state_dict()
    for name, value in merged_by_peft(tmp_path / "a", tiny_model_dir).items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.slow
def test_two_ranks_under_zero3_from_an_adapter_equal_one_process(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", tiny_model_dir)
    alone = recipe("simcse", folder, texts_file, tmp_path / "one", max_steps=3, **NO_DROPOUT)
    both = {**alone, "output_dir": str(tmp_path / "two"), "deepspeed": "ds_configs/zero3.json"}
    rows = zip(trained(alone), trained(both, ranks=2), strict=True)
    for row, other in rows:
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    expected, found = (Encoder.from_pretrained(tmp_path / n / "encoder") for n in ("one", "two"))
    torch.testing.assert_close(found.trunk.state_dict(), expected.trunk.state_dict(), rtol=1e-5, atol=1e-5)


def test_every_weight_can_train_from_an_adapter(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    values = values_of("simcse", tiny_model_dir, texts_file, tmp_path)
    train(parse_recipe({**values, "adapter": None}))
    found = Encoder.from_pretrained(tmp_path / "run" / "encoder").trunk.state_dict()
    expected = merged_by_peft(tmp_path / "a", tiny_model_dir)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_over_nf4_it_is_stacked(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tiny_model_dir, layers_to_transform=[1])
    stack = read_stack(str(folder), "nf4", None)
    assert (stack.base, len(stack.earlier), stack.merged) == (str(tiny_model_dir), 1, ())
    whole, nf4 = (load_trunk(stack.base, TrunkOptions(quantization=q)) for q in (None, "nf4"))
    before = merged_state_dict(nf4)
    put_stack_in(nf4, stack)
    after, exact = merged_state_dict(nf4), merged_by_peft(folder, tiny_model_dir)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(after[name] - before[name], exact[name] - value, rtol=1e-4, atol=1e-6)
    patterned = adapter(tmp_path / "b", tiny_model_dir, rank_pattern={"q_proj": 8})
    with pytest.raises(UserError, match="several ranks or scales"):
        read_stack(str(patterned), "nf4", None)
    changing = adapter(tmp_path / "c", tiny_model_dir, init_lora_weights="pissa")
    with pytest.raises(UserError, match="init_lora_weights='pissa', which changes the base weights"):
        read_stack(str(changing), "nf4", None)


def test_places(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An adapter on an adapter; a tokenizer beside it, or its base's; what tells models apart."""
    first = adapter(tmp_path / "a", tiny_model_dir)
    second = adapter(tmp_path / "b", tiny_model_dir)
    config = json.loads((second / "adapter_config.json").read_text())
    changed = {**config, "base_model_name_or_path": str(first)}
    (second / "adapter_config.json").write_text(json.dumps(changed))
    assert resolve(str(second)).adapters == (first, second)
    assert tokenizer_place(str(second)) == str(tiny_model_dir)
    shutil.copy(tiny_model_dir / "tokenizer_config.json", second)
    assert tokenizer_place(str(second)) == str(second)
    assert len({model_fingerprint(str(folder)) for folder in (tiny_model_dir, first, second)}) == 3
