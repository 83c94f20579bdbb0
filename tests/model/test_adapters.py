"""LoRA: what trains, and that merging changes no vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapters import add_lora, merged_state_dict
from llm2vec_ds.model.cpu_linear import use_fast_products
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_trunk import trunk


def test_only_adapters_train_and_a_zero_b_changes_nothing() -> None:
    model = trunk()
    use_fast_products(model, torch.device("cpu"))  # as the adapters' operation does
    before = Encoder(model, tiny_tokenizer())(pack(texts())).detach()
    names = add_lora(model, AdapterConfig(rank=4))
    assert len(names) == 2 * 7  # two layers of q, k, v, o, gate, up, down
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(names)
    assert all("lora_" in name for name in trainable)
    after = Encoder(model, tiny_tokenizer())(pack(texts())).detach()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_merged_weights_give_the_vectors_of_the_adapted_model(tmp_path: Path) -> None:
    model = trunk()
    plain_names = set(model.state_dict())
    before = Encoder(model, tiny_tokenizer())(pack(texts())).detach()
    add_lora(model, AdapterConfig(rank=4, zero_init=False))
    encoder = Encoder(model, tiny_tokenizer()).eval()
    adapted = encoder(pack(texts())).detach()
    assert (adapted - before).abs().max() > 1e-2
    state = merged_state_dict(model)
    assert set(state) == plain_names
    encoder.save(tmp_path / "encoder", state)
    loaded = Encoder.from_pretrained(tmp_path / "encoder")(pack(texts())).detach()
    torch.testing.assert_close(loaded, adapted, rtol=1e-5, atol=1e-5)


def test_unknown_targets_name_the_layers_there_are() -> None:
    with pytest.raises(UserError, match="linear layers here: down_proj, gate_proj"):
        add_lora(trunk(), AdapterConfig(target_modules=["query_proj"]))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("embed_tokens", r"is on embed_tokens \(Embedding\), but adapters are for linear layers"),
        ("lm_head", "matches nothing in this trunk"),
        ("norm", r"is on norm \(\w*RMSNorm\)"),
        ("q_prj", "matches nothing in this trunk"),
    ],
)
@pytest.mark.parametrize("beside", [[], ["q_proj"]])
def test_each_target_is_a_linear_layer(target: str, said: str, beside: list[str]) -> None:
    """peft passes over a name that nothing has."""
    with pytest.raises(
        UserError, match=f"adapter.target_modules: '{target}' {said}.*linear layers here: down_proj"
    ):
        add_lora(trunk(), AdapterConfig(target_modules=[*beside, target]))
