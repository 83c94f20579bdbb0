"""QLoRA on a CPU: NF4 trains, merges exactly into what it trained on, stacks over stages, and loads back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.engine.deepspeed_engine import deepspeed_config
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.export.merge import merge_into_original
from llm2vec_ds.model.adapter_stack import put_stack_in, read_stack
from llm2vec_ds.model.adapters import add_lora, merged_state_dict
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.model.quantization import quantized_layers
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT, recipe
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer

NF4 = TrunkOptions(quantization="nf4")
VARIANTS = ["lora", "rslora", "dora"]


def quantised(folder: Path) -> Any:
    return load_trunk(str(folder), NF4)


def vectors(trunk: Any) -> torch.Tensor:
    with torch.no_grad():
        return Encoder(trunk, tiny_tokenizer()).eval()(pack(texts()))


def randomise(trunk: Any) -> None:
    """Adapters as training would leave them: no B is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def qlora(stage: str, model: Path, file: Path, run: Path, **changes: Any) -> dict[str, Any]:
    values = recipe(stage, model, file, run, **{**NO_DROPOUT, **changes})
    values["model"]["quantization"] = "nf4"
    return values


def test_every_linear_layer_of_the_trunk_is_in_4_bits_and_the_rest_is_not(tiny_model_dir: Path) -> None:
    trunk = quantised(tiny_model_dir)
    assert len(quantized_layers(trunk)) == 2 * 7
    weight = trunk.layers[0].mlp.up_proj.weight
    assert weight.numel() * weight.itemsize == 64 * 32 // 2
    assert weight.quant_state.nested  # double quantisation
    assert trunk.embed_tokens.weight.shape == (400, 32)
    assert weight.dtype == trunk.embed_tokens.weight.dtype == torch.float32


def test_nf4_moves_vectors_and_little(tiny_model_dir: Path) -> None:
    full = vectors(load_trunk(str(tiny_model_dir), TrunkOptions()))
    cosine = torch.cosine_similarity(vectors(quantised(tiny_model_dir)), full, dim=-1)
    assert 0.8 < cosine.min() < 0.9999


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_give_the_vectors_of_the_adapted_nf4_model(
    variant: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trunk = quantised(tiny_model_dir)
    before = vectors(trunk)
    add_lora(trunk, AdapterConfig(rank=4, variant=variant, zero_init=False))  # type: ignore[arg-type]
    randomise(trunk)
    adapted = vectors(trunk)
    assert (adapted - before).abs().max() > 1e-2
    Encoder(trunk, tiny_tokenizer()).save(tmp_path / "encoder", merged_state_dict(trunk))
    assert "quantization_config" not in json.loads((tmp_path / "encoder" / "config.json").read_text())
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    assert not quantized_layers(loaded)
    torch.testing.assert_close(vectors(loaded.trunk), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
def test_merged_weights_of_variants_over_full_weights(variant: str, tiny_model_dir: Path) -> None:
    trunk = load_trunk(str(tiny_model_dir), TrunkOptions())
    before = vectors(trunk)  # where each starts
    add_lora(trunk, AdapterConfig(rank=4, variant=variant))  # type: ignore[arg-type]
    torch.testing.assert_close(vectors(trunk), before, rtol=1e-4, atol=1e-4)
    randomise(trunk)
    adapted = vectors(trunk)
    plain = load_trunk(str(tiny_model_dir), TrunkOptions())
    plain.load_state_dict(merged_state_dict(trunk))
    torch.testing.assert_close(vectors(plain), adapted, rtol=1e-4, atol=1e-4)


def test_three_stages_stack_over_one_base(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    """Losses fall in each (also after a held-out measurement), and each folder loads back in both forms."""
    mntp = qlora("mntp", tiny_model_dir, texts_file, tmp_path / "mntp", max_steps=20)
    mntp["data"]["held_out_path"] = str(texts_file)
    mntp["optimizer"]["lr"] = 1e-2
    train(parse_recipe(mntp))
    rows = [json.loads(line) for line in (tmp_path / "mntp" / "held_out.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    stage = tmp_path / "mntp" / "encoder"
    for number, name in enumerate(("simcse", "again"), start=1):
        train(parse_recipe(qlora("simcse", stage, texts_file, tmp_path / name, max_steps=2)))
        stage = tmp_path / name / "encoder"
        stack = read_stack(str(stage), "nf4", None)
        assert stack.base == str(tiny_model_dir.resolve())
        assert len(stack.earlier) == number + 1
        trunk = quantised(Path(stack.base))
        put_stack_in(trunk, stack)
        merged = Encoder.from_pretrained(stage)
        torch.testing.assert_close(vectors(trunk), vectors(merged.trunk), rtol=1e-4, atol=1e-4)
    first = load_file(tmp_path / "mntp" / "encoder" / "adapters" / "0.safetensors")
    kept = load_file(stage / "adapters" / "0.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in first.items())


def test_merge_into_the_original_weights_tells_the_difference(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    train(parse_recipe(qlora("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=2)))
    folder = tmp_path / "run" / "encoder"
    difference = merge_into_original(folder, tmp_path / "merged")
    words = own_graded_pairs().first[: difference.n_texts]
    both = [Encoder.from_pretrained(f).encode(words, normalize=True) for f in (folder, tmp_path / "merged")]
    cosine = (both[0] * both[1]).sum(1)
    assert difference.mean_cosine == pytest.approx(cosine.mean(), abs=1e-5)
    assert difference.least_cosine == pytest.approx(cosine.min(), abs=1e-5)
    assert cosine.max() < 0.9999  # the weights were in 4 bits, and are not
    trunk = load_trunk(str(tiny_model_dir), TrunkOptions())
    put_stack_in(trunk, read_stack(str(folder), "nf4", None))
    merged = Encoder.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(vectors(merged.trunk), vectors(trunk), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="exists: choose another"):
        merge_into_original(folder.parent, tmp_path / "merged")  # the run's folder stands for its encoder
    with pytest.raises(UserError, match="is a single encoder, and not of a run over NF4"):
        merge_into_original(tiny_model_dir, tmp_path / "other")


def _train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> None:
    for values in recipes:
        train(parse_recipe(values))


def _split_everything(folder: Path, config: str) -> Path:
    """The shipped JSON; under ZeRO-3 even the smallest parameter is split, as all are in a large model."""
    values = json.loads((ROOT / "ds_configs" / f"{config}.json").read_text())
    if config == "zero3":
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{config}.json"
    path.write_text(json.dumps(values))
    return path


def recipes_for(config: str | None, model: Path, file: Path, folder: Path) -> list[dict[str, Any]]:
    """Both stages, three steps each."""
    folder = folder / str(config)
    folder.mkdir()
    recipes = [qlora(stage, model, file, folder / stage, max_steps=3) for stage in ("mntp", "simcse")]
    for values in recipes:
        values["deepspeed"] = str(_split_everything(folder, config)) if config else None
    return recipes


def outcome(values: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Metrics; merged weights and the adapter's own."""
    run = Path(values["output_dir"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = (run / "encoder" / name for name in ("model.safetensors", "adapters/0.safetensors"))
    merged, adapter = map(load_file, files)
    return rows, {**merged, **{f"adapter.{key}": value for key, value in adapter.items()}}


CONFIGS = (None, "zero2", "zero3")


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path
) -> dict[str | None, list[dict[str, Any]]]:
    """Recipes that two ranks have trained, by DeepSpeed JSON; all in one start of the processes."""
    folder = tmp_path_factory.mktemp("two")
    recipes = {config: recipes_for(config, tiny_model_dir, texts_file, folder) for config in CONFIGS}
    run_ranks(partial(_train_all, recipes=[r for own in recipes.values() for r in own]), 2)
    return recipes


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path
) -> list[dict[str, Any]]:
    recipes = recipes_for(None, tiny_model_dir, texts_file, tmp_path_factory.mktemp("one"))
    _train_all(0, 1, recipes)
    return recipes


@pytest.mark.parametrize("config", CONFIGS)
def test_two_ranks_equal_one_process(
    config: str | None, one_process: list[dict[str, Any]], two_ranks: dict[str | None, list[dict[str, Any]]]
) -> None:
    for values, others in zip(two_ranks[config], one_process, strict=True):
        (rows, weights), (other_rows, other_weights) = outcome(values), outcome(others)
        for row, other in zip(rows, other_rows, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert weights.keys() == other_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, other_weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "precision"), [(None, "fp32"), (None, "bf16"), ("zero2", "bf16")])
def test_an_optimizer_that_deepspeed_does_not_build(
    config: str | None,
    precision: str,
    tiny_model_dir: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The 8-bit one needs a GPU; torch's AdamW in its place takes the same way and gives the same losses."""
    import bitsandbytes

    from llm2vec_ds.engine import deepspeed_engine

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", torch.optim.AdamW)
    monkeypatch.setattr(deepspeed_engine, "check_combination", lambda *_, **__: None)
    losses = []
    for name in ("adamw", "paged_adamw_8bit"):
        values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / name, max_steps=3, **NO_DROPOUT)
        values["optimizer"]["name"] = name
        values["model"]["precision"] = precision
        values["deepspeed"] = str(ROOT / "ds_configs" / f"{config}.json") if config else None
        train(parse_recipe(values))
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    # To rounding: torch's is given one flat parameter, bitsandbytes' many.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


VALUES = {"stage": "mntp", "model": {"path": "m"}, "data": {"path": "t.txt"}, "output_dir": "o"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "m", "quantization": "nf4"}, "adapter": None}, "nf4 freezes all weights"),
        (
            {"model": {"path": "m", "quantization": "nf4"}, "adapter": {"variant": "pissa"}},
            "use lora",
        ),
        ({"adapter": {"variant": "pissa", "zero_init": False}}, "no effect with variant: pissa"),
        ({"optimizer": {"name": "paged_adamw_8bit"}}, "needs a CUDA GPU"),
        (
            {"adapter": {"variant": "pissa"}, "deepspeed": str(ROOT / "ds_configs" / "zero3.json")},
            "pissa needs whole weights",
        ),
        (
            {
                "model": {"path": "m", "quantization": "nf4"},
                "deepspeed": str(ROOT / "ds_configs" / "zero3_offload.json"),
            },
            "keeps parameters on the",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it is right with a GPU")
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        deepspeed_config(parse_recipe({**VALUES, **changes}), 1, torch.float32)
    assert "\n" not in str(caught.value)


def test_bitsandbytes_is_asked_for_by_name(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2vec_ds.model import quantization

    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'llm2vec-ds\\[qlora\\]'"):
        quantised(tiny_model_dir)


def test_a_damaged_stack_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "stack.json").write_text("{}")
    with pytest.raises(UserError, match="stack.json is damaged"):
        read_stack(str(tmp_path), "nf4", None)
    assert read_stack(str(tmp_path), None, None).base == str(tmp_path)
