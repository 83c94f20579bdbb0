"""Planned activations against the tensors that autograd saves in the real pass."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.attention import register
from llm2vec_ds.model.bidirectional import with_causal
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.model.recomputation import recompute_activations
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.recipe.objectives import MntpConfig
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from llm2vec_ds.recipe.sections import MachineConfig
from tests.support.measure import storage_bytes
from tests.support.runs import ROOT

CPU = MachineConfig(gpus_per_node=0, memory_gib=64)
TEXTS, TOKENS = 4, 48

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "vocab_size": 400}
CASES = {
    "lora": ("mntp", {}),
    "no adapter": ("mntp", {"adapter": None}),
    "lora dropout": ("mntp", {"adapter": {"rank": 4, "dropout": 0.1}}),
    "attention dropout": ("simcse", {"simcse": {"attention_dropout": 0.3}}),
    "full_checkpointing": ("mntp", {"model": {"activation_checkpointing": "full"}}),
    "no_checkpointing": ("mntp", {"model": {"activation_checkpointing": "none"}}),
    "simcse, last token": ("simcse", {"pooling": "last", "simcse": {"attention_dropout": 0.0}}),
}


def recipe_for(stage: str, changes: dict[str, Any], config_file: Path) -> Recipe:
    model = {"path": "none", "config_file": str(config_file), **changes.get("model", {})}
    values = {
        "stage": stage,
        "data": {"path": "t.txt", "max_tokens": TOKENS},
        "output_dir": "o",
        "batch": {"global_batch_size": TEXTS if stage == "mntp" else TEXTS // 2},
        "adapter": {"rank": 4, "dropout": 0.0},
        **changes,
        "model": model,
    }
    return parse_recipe(values)


def saved_bytes(recipe: Recipe, config: Any) -> int:
    """Of what autograd saves between forward and backward on the CPU, and selective activation
    checkpointing beside it (in Python), weights left out."""
    torch.manual_seed(0)
    config = with_causal(config, False)
    config.attention_dropout = recipe.objective.attention_dropout
    mntp = recipe.objective if isinstance(recipe.objective, MntpConfig) else None
    auto_class = AutoModelForCausalLM if mntp else AutoModel
    model = auto_class.from_config(config, dtype=torch.float32, attn_implementation=register("torch"))
    fuse_layers(model.base_model)
    if recipe.adapter is not None:
        model.requires_grad_(False)
        add_lora(model.base_model, recipe.adapter)
    recompute_activations(model.base_model, recipe.model.activation_checkpointing)
    bounds = torch.arange(0, TEXTS * TOKENS + 1, TOKENS, dtype=torch.int32)
    ids = torch.randint(0, config.vocab_size, (TEXTS * TOKENS,))
    positions = torch.arange(TOKENS).repeat(TEXTS)
    batch = PackedBatch(ids, positions, bounds, TOKENS, torch.ones(len(ids), dtype=torch.bool))
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved.append(tensor)
        return tensor

    model.train()
    before = {id(found) for found in gc.get_objects()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False,
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=TOKENS, max_length_k=TOKENS,
        ).last_hidden_state[0]  # fmt: skip
        if mntp is not None:
            head = MaskedTokenHead(model.get_output_embeddings(), config, mntp.head_chunk_tokens)
            rows = torch.arange(round(mntp.mask_rate * len(ids)))
            result = head(hidden[rows], ids[rows])[0]
        else:
            result = POOLINGS[recipe.pooling](hidden, batch)
    assert result.requires_grad
    del hidden
    in_python = [x for x in gc.get_objects() if id(x) not in before and isinstance(x, torch.Tensor)]
    # The states of random generators, 5 KB a layer, are neither planned nor of any weight.
    floats = (x for x in in_python if x.is_floating_point())
    kept = (x for x in floats if x.untyped_storage()._cdata not in weights)
    return storage_bytes([*saved, *kept])


@pytest.mark.parametrize("name", CASES)
def test_tiny(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    stage, changes = CASES[name]
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **TINY)
    config.save_pretrained(tmp_path)
    recipe = recipe_for(stage, changes, tmp_path / "config.json")
    planned = Planner(recipe, machine=CPU).memory(None)
    assert planned.activations == pytest.approx(saved_bytes(recipe, config), rel=0.1)
    assert planned.temporaries > 0


@pytest.mark.parametrize("name", ["lora", "lora dropout", "full_checkpointing", "no_checkpointing"])
def test_smollm2_135m(name: str) -> None:
    path = ROOT / "recipes" / "smollm2_135m" / "config.json"
    stage, changes = CASES[name]
    recipe = recipe_for(stage, changes, path)
    planned = Planner(recipe, machine=CPU).memory(None)
    assert planned.activations == pytest.approx(
        saved_bytes(recipe, AutoConfig.from_pretrained(path)), rel=0.1
    )
