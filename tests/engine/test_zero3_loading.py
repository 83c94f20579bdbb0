"""Loading under ZeRO-3: no rank ever holds the whole model, and its parts are the plain load's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm2vec_ds.distributed import agreed, ranks_from_environment
from llm2vec_ds.engine.deepspeed_engine import deepspeed_config, partition_for, start_process_group
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapters import add_lora, merged_state_dict
from llm2vec_ds.model.loading import TrunkOptions, load_trunk, load_trunk_and_head
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.ranks import run_ranks
from tests.support.tiny import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LORA = AdapterConfig(rank=2, dropout=0.0, target_modules=["q_proj", "o_proj"], zero_init=False)


def options_of(rank: int, world: int, precision: str, zero_stage: int = 3) -> TrunkOptions:
    """As a run makes them; starts DeepSpeed."""
    device = start_process_group(ranks_from_environment())
    values = {
        "stage": "mntp",
        "model": {"path": "m"},
        "data": {"path": "t.txt"},
        "output_dir": "o",
        "deepspeed": str(ROOT / "ds_configs" / f"zero{zero_stage}.json"),
    }
    options = TrunkOptions(precision=precision, device=device)
    config = deepspeed_config(parse_recipe(values), world, options.dtype)
    return TrunkOptions(precision=precision, device=device, partition=partition_for(config))


def gather(parameters: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def held_elements(model: nn.Module) -> int:
    """Elements of all parameters that this process has in memory, whole or as its part."""
    storages = {}
    for parameter in model.parameters():
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = (
                    tensor.untyped_storage().nbytes() // tensor.element_size()
                )
    return sum(storages.values())


def load(rank: int, world: int, folders: list[str], precision: str) -> list[dict[str, Any]]:
    """Each folder's model loaded in parts: what this rank holds, its buffers, and all weights gathered."""
    options = options_of(rank, world, precision)
    found = []
    for folder in folders:
        trunk, linear = load_trunk_and_head(folder, options)
        head = MaskedTokenHead(linear, trunk.config, 8)
        whole = nn.ModuleDict({"trunk": trunk, "head": head})
        n_held, n_all = held_elements(whole), sum(p.ds_numel for p in whole.parameters())
        torch.manual_seed(0)
        add_lora(trunk, LORA)
        found.append(
            {
                "share": n_held / n_all,
                "buffers": {name: buffer.clone() for name, buffer in whole.named_buffers()},
                "weights": merged_state_dict(whole, gather),
                "zero3_is_seen": partition_is_seen(),
            }
        )
    return found


def partition_is_seen() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def expected(folder: str, precision: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights with the same adapters merged, and buffers, of a plain load."""
    trunk, linear = load_trunk_and_head(folder, TrunkOptions(precision=precision))
    whole = nn.ModuleDict({"trunk": trunk, "head": MaskedTokenHead(linear, trunk.config, 8)})
    torch.manual_seed(0)
    add_lora(trunk, LORA)
    return merged_state_dict(whole), dict(whole.named_buffers())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tied and untied heads, several files, and experts that loading has to merge."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model_type, changes in (
        ("untied", "llama", {}),
        ("tied", "llama", {"tie_word_embeddings": True}),
        ("experts", "mixtral", EXPERTS),
    ):
        config = AutoConfig.for_model(model_type, **SIZES, **changes)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if name == "tied" else None)
        model.save_pretrained(folder / name, max_shard_size="40KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    assert "experts.0.w1" in (folder / "experts" / "model.safetensors.index.json").read_text()
    return [str(folder / name) for name in ("untied", "tied", "experts")]


@pytest.mark.parametrize(("world", "precision"), [(2, "fp32"), (4, "bf16"), (1, "fp32")])
def test_every_rank_holds_its_part_and_the_parts_are_the_model(
    world: int, precision: str, folders: list[str]
) -> None:
    by_rank = run_ranks(partial(load, folders=folders, precision=precision), world)
    for place, folder in enumerate(folders):
        weights, buffers = expected(folder, precision)
        for found in (results[place] for results in by_rank):
            assert not found["zero3_is_seen"]
            assert 1 / world <= found["share"] < 1 / world + 0.02
            assert found["weights"].keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=0)
            assert found["buffers"].keys() == buffers.keys()
            assert any("inv_freq" in name for name in buffers)
            for name, buffer in buffers.items():
                torch.testing.assert_close(found["buffers"][name], buffer, rtol=0, atol=0)


def refused(rank: int, world: int, folder: str) -> str:
    """The mistake as this rank tells it."""
    options = options_of(rank, world, "fp32")
    try:
        agreed(lambda: load_trunk(folder, options))
    except UserError as error:
        return str(error)
    return ""


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damaged", ["missing", "narrow"])
def test_unusable_weights_are_every_ranks_mistake(damaged: str, tmp_path: Path) -> None:
    """Rank 0 alone sees values; the others must not wait for it."""
    save_tiny_llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    if damaged == "missing":
        damage(tmp_path, lambda weights: weights.pop(name))
    else:
        damage(tmp_path, lambda weights: weights.update({name: weights[name][:, :16].clone()}))
    first, second = run_ranks(partial(refused, folder=str(tmp_path)), 2)
    assert first == second
    assert "lacks weights: " in first if damaged == "missing" else "size mismatch" in first


def ungathered(rank: int, world: int, folder: str) -> list[str]:
    """What saving says of parts that were not gathered, with and without adapters."""
    options = options_of(rank, world, "fp32")
    said = []
    for lora in (None, LORA):
        trunk = load_trunk(folder, options)
        if lora is not None:
            add_lora(trunk, lora)
            trunk.embed_tokens, trunk.norm = nn.Identity(), nn.Identity()
        with pytest.raises(RuntimeError) as error:
            merged_state_dict(trunk)
        said.append(str(error.value))
    return said


def test_parts_are_not_saved_as_weights(tiny_model_dir: Path) -> None:
    for plain, adapted in run_ranks(partial(ungathered, folder=str(tiny_model_dir)), 2):
        assert plain.startswith("embed_tokens.weight has shape (0,) instead of (400, 32)")
        assert adapted.startswith(
            "layers.0.self_attn.q_proj.base_layer.weight has shape (0,) instead of (32, 32)"
        )


def test_only_zero3_loads_in_parts() -> None:
    for path in (ROOT / "ds_configs").glob("*.json"):
        config = json.loads(path.read_text())
        with partition_for(config)():
            assert partition_is_seen() == path.stem.startswith("zero3")
        assert not partition_is_seen()
