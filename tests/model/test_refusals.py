"""Model types without the switch are refused by name, before any weight is read, bidirectional or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.loading import TrunkOptions, load_trunk, load_trunk_and_head


@pytest.mark.parametrize("load", [load_trunk, load_trunk_and_head])
@pytest.mark.parametrize("model_type", ["falcon", "bloom", "mpt", "gptj", "codegen"])
def test_types_without_the_switch(model_type: str, load: object, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model type '{model_type}' cannot be made bidirectional: .* Use a"):
        load(str(tmp_path), TrunkOptions())  # type: ignore[operator]


@pytest.mark.parametrize("model_type", ["falcon", "mpt", "codegen"])
def test_they_cannot_be_a_causal_baseline_either(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model type '{model_type}' takes no attention function but its own"):
        load_trunk(str(tmp_path), TrunkOptions(causal=True))
