"""Every shipped recipe goes through the real parser, and its model is what its name says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm2vec_ds.data.pairs import _read_instructions
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.bidirectional import check_can_be_bidirectional, with_causal
from llm2vec_ds.planner.plan import Planner
from llm2vec_ds.recipe.files import load_recipe, load_stages

ROOT = Path(__file__).resolve().parents[2]
QLORA_PAGE = ROOT / "docs" / "qlora.md"
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name != "data" and not path.stem.endswith("ablation")  # those: test_ablate.py
)

PARAMETERS = {
    "sheared_llama_1.3b": 1_345_423_360,
    "llama2_7b_chat": 6_738_415_616,
    "mistral_7b_instruct": 7_241_732_096,
    "llama3_8b_instruct": 8_030_261_248,
    "qwen3_0.6b": 596_049_920,
    "gemma3_1b": 999_885_952,
    "smollm2_135m": 134_515_008,
}
"""As published with the weights."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_is_valid_and_what_it_names_is_there(path: Path) -> None:
    if path.stem.startswith("qlora_"):
        check_qlora(path)
        return
    if path.stem == "own_data":
        assert [stage.stage for stage in load_stages(path)] == ["mntp", "simcse", "supervised"]
        assert all((ROOT / str(stage.data.path)).exists() for stage in load_stages(path))
        return
    recipe = load_recipe(path)
    assert path.stem.endswith(recipe.stage)
    if recipe.deepspeed:
        assert (ROOT / recipe.deepspeed).is_file()
    if recipe.stage == "distil":
        assert recipe.output_dir == f"runs/{path.parent.name}/{path.stem}"
    elif path.parent.name != "recipes":
        assert recipe.max_steps == 1000
        if path.stem.startswith("full_"):
            assert recipe.adapter is None
        else:
            assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (16, 32, 0.05)  # type: ignore[union-attr]
        assert recipe.output_dir == f"runs/{path.parent.name}/{path.stem}"
    else:
        assert (ROOT / str(recipe.data.path)).exists()


def check_qlora(path: Path) -> None:
    """All three stages, the later two over the adapter of the first."""
    stages = load_stages(path)
    assert [recipe.stage for recipe in stages] == ["mntp", "simcse", "supervised"]
    for recipe in stages:
        assert recipe.model.quantization == "nf4"
        assert recipe.model.activation_checkpointing == "full"
        assert recipe.optimizer.name == "paged_adamw_8bit"
        assert recipe.output_dir == f"runs/{path.stem}/{recipe.stage}"
        assert (ROOT / str(recipe.model.config_file)).is_file()
    assert {recipe.model.path for recipe in stages[1:]} == {f"runs/{path.stem}/mntp/encoder"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_fits_on_the_machine_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    peaks_gib = []
    for recipe in load_stages(path):
        assert "machine" in recipe.model_fields_set
        planner = Planner(recipe, path)
        memory = planner.memory(recipe.deepspeed)
        assert 0.05 * planner.limit() < memory.peak <= planner.limit()
        peaks_gib.append(memory.peak / 2**30)
        # A rank's batch may be less than its token budget has room for.
        n_tokens = planner.load.texts_per_pass * recipe.data.max_tokens
        assert planner.largest_token_budget() >= min(n_tokens, recipe.batch.micro_batch_tokens)
    if path.stem.startswith("qlora_"):
        (row,) = re.findall(rf"^\| `recipes/{path.name}` .*$", QLORA_PAGE.read_text(), re.MULTILINE)
        assert row.endswith(f"| {max(peaks_gib):.1f} GiB |")


def test_paper_settings() -> None:
    """BehnamGhader et al., 2024, appendix D, and the training configs published with it."""
    mntp = load_recipe(ROOT / "recipes" / "llama2_7b_chat" / "mntp.yaml")
    assert (mntp.batch.global_batch_size, mntp.data.max_tokens, mntp.optimizer.lr) == (32, 512, 5e-5)
    assert mntp.mntp is not None
    assert (mntp.mntp.mask_token, mntp.mntp.mask_rate, mntp.mntp.masking) == ("_", 0.2, "bert")
    mistral = load_recipe(ROOT / "recipes" / "mistral_7b_instruct" / "mntp.yaml").mntp
    assert mistral is not None
    assert (mistral.mask_rate, mistral.masking) == (0.8, "all")
    simcse = load_recipe(ROOT / "recipes" / "llama2_7b_chat" / "simcse.yaml")
    assert (simcse.batch.global_batch_size, simcse.data.max_tokens, simcse.optimizer.lr) == (128, 128, 3e-5)
    assert simcse.simcse is not None
    assert (simcse.simcse.attention_dropout, simcse.simcse.scale) == (0.3, 20)
    for name in ("sheared_llama_1.3b", "llama2_7b_chat", "mistral_7b_instruct", "llama3_8b_instruct"):
        recipe = load_recipe(ROOT / "recipes" / name / "supervised.yaml")
        assert (recipe.batch.global_batch_size, recipe.data.max_tokens, recipe.optimizer.lr) == (
            512,
            512,
            2e-4,
        )
        assert recipe.optimizer.warmup_steps == 300
        assert recipe.supervised is not None
        assert recipe.supervised.scale == 50
        assert recipe.model.path == f"runs/{name}/mntp/encoder"


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_beside_the_recipe(name: str) -> None:
    """Built without memory, with adapters: as many parameters as published, and a switch."""
    path = ROOT / "recipes" / name
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(with_causal(config, False))
        assert model.num_parameters() == PARAMETERS[name]
        check_can_be_bidirectional(model.base_model)
        recipe = load_recipe(path / "mntp.yaml")
        assert recipe.adapter is not None
        adapters = add_lora(model.base_model, recipe.adapter)
    assert len(adapters) == 7 * config.num_hidden_layers
    if name == "llama2_7b_chat":
        trainable = sum(p.numel() for p in model.base_model.parameters() if p.requires_grad)
        assert trainable == 39_976_960  # LoRA r 16 on all linear layers of Llama-2-7B, as peft reports it
    assert json.loads((path / "config.json").read_text())["model_type"] == config.model_type


def test_e5_instructions_name_the_public_files() -> None:
    """One file a source, as published with the Echo paper; natural-language inference comes in two parts."""
    given = _read_instructions(ROOT / "recipes" / "data" / "e5_instructions.yaml")
    assert len(given) == 16
    assert {given[f"allnli_split{i}"].group for i in (1, 2)} == {"allnli"}
    with_document = {name for name, source in given.items() if source.instructions.document}
    assert with_document == {"allnli_split2", "quora_duplicates_split1", "quora_duplicates_split2"}
    instructions = [source.instructions for source in given.values()]
    assert all(i.query and i.document in (None, i.query) for i in instructions)
    assert all(source.in_batch_negatives for source in given.values())


def test_every_model_folder_has_both_stages() -> None:
    for name in PARAMETERS:
        assert {p.name for p in (ROOT / "recipes" / name).iterdir()} >= {
            "config.json",
            "mntp.yaml",
            "simcse.yaml",
        }
