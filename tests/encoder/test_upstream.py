"""Adapters of upstream `llm2vec` give upstream's vectors here (tests/support/upstream.py says how)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2vec_ds import Encoder, UserError
from tests.support.upstream import CHAT_TEMPLATE, FIXTURES, INSTRUCTIONS, TEXTS, build

ROWS = json.loads((FIXTURES / "vectors.json").read_text())["rows"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream") / "models"
    build(folder)
    return folder


def load(models: Path, folder: str = "mntp", **settings: Any) -> Encoder:
    return Encoder.from_pretrained(models / folder, adapters=[models / "task"], settings=settings)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['folder']} {r['instruction'] and 'instruction'} {r['skip_instruction']}"
)
def test_vectors_are_those_of_upstream(row: dict[str, Any], models: Path) -> None:
    settings: dict[str, Any] = {"text_span": "upstream"}
    if row["folder"] == "chat":
        settings["template"] = CHAT_TEMPLATE
    if not row["skip_instruction"]:
        settings["pooled_tokens"] = "all"
    found = load(models, row["folder"], **settings).encode(TEXTS, instruction=row["instruction"])
    np.testing.assert_allclose(found, np.array(row["vectors"]), atol=1e-4)
    assert np.abs(found).max() > 0.5  # so that 1e-4 says something


def test_without_the_switch_only_miscounted_texts_differ(models: Path) -> None:
    """A blank before the first word changes its tokens; whoever counts them without it is off."""
    switched, own = (load(models, text_span=span, max_text_tokens=None) for span in ("upstream", "offsets"))
    difference = np.abs(
        switched.encode(TEXTS[:-1], instruction=INSTRUCTIONS[1])
        - own.encode(TEXTS[:-1], instruction=INSTRUCTIONS[1])
    ).max(axis=1)
    assert difference.max() > 1e-2
    np.testing.assert_allclose(switched.encode(TEXTS[:3]), own.encode(TEXTS[:3]), atol=1e-6)


def test_the_order_of_adapters_is_that_of_their_names(models: Path) -> None:
    stacked = load(models)
    listed = Encoder.from_pretrained(models / "base", adapters=[models / "mntp", models / "task"])
    base = Encoder.from_pretrained(models / "base")
    np.testing.assert_allclose(stacked.encode(TEXTS), listed.encode(TEXTS), atol=1e-5)
    assert np.abs(base.encode(TEXTS) - listed.encode(TEXTS)).max() > 0.1
    assert not [name for name, _ in listed.trunk.named_parameters() if "lora" in name]


def test_what_upstream_says_of_pooling_is_kept(models: Path) -> None:
    assert load(models).settings.max_text_tokens == 400
    assert load(models).settings.pooled_tokens == "text"


def test_a_stack_can_be_saved_and_loaded(models: Path, tmp_path: Path) -> None:
    encoder = load(models, text_span="upstream")
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    np.testing.assert_allclose(
        loaded.encode(TEXTS, instruction="x"), encoder.encode(TEXTS, instruction="x"), atol=1e-6
    )


def spoil(models: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    folder = Path(shutil.copytree(models / "task", tmp_path / "task"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "has the type 'IA3': only LORA can be merged"),
        ({"use_dora": True}, "has use_dora=True, which cannot be merged here"),
        ({"modules_to_save": ["embed_tokens"]}, r"has modules_to_save=\['embed_tokens'\]"),
        ({"target_modules": ["query"]}, "does not fit LlamaModel: Target modules"),
        ({"target_modules": ["q_proj"]}, "has weights for layers.0.mlp.down_proj.lora_A"),
        ({"r": 8}, r"has shape \(4, 64\), the model's is \(8, 64\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    changes: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    folder = spoil(models, tmp_path, changes)
    with pytest.raises(UserError, match=said) as caught:
        Encoder.from_pretrained(models / "base", adapters=[folder])
    assert "\n" not in str(caught.value)


def test_pickled_adapters_and_missing_ones_are_refused(models: Path, tmp_path: Path) -> None:
    folder = spoil(models, tmp_path, {})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        Encoder.from_pretrained(models / "base", adapters=[folder])
    with pytest.raises(UserError, match="there is no such folder"):
        Encoder.from_pretrained(models / "base", adapters=["owner/name"])
    with pytest.raises(UserError, match="has no adapter_config.json"):
        Encoder.from_pretrained(models / "base", adapters=[models / "base"])


def test_code_of_a_checkpoint_is_never_run(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "base", tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match="it needs its own code"):
        Encoder.from_pretrained(folder)


def test_unknown_settings_are_named(models: Path) -> None:
    for settings, said in [
        ({"poling": "mean"}, "unknown encoder setting 'poling'"),
        ({"text_span": "x"}, "text_span='x' is unknown: choose offsets, upstream"),
        ({"pooling": "max"}, "pooling='max' is unknown"),
    ]:
        with pytest.raises(UserError, match=said):
            load(models, **settings)
