"""Model types without the switch are refused by name, before any weight is read, bidirectional or not."""

from __future__ import annotations

import json
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
    with pytest.raises(UserError, match=f"model type '{model_type}' allows only its own attention function"):
        load_trunk(str(tmp_path), TrunkOptions(causal=True))


def test_code_beside_a_model_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "c.py").write_text("raise ValueError('it ran')\n")
    with pytest.raises(UserError, match=r"needs its own code, .* set model.trust_remote_code=true"):
        load_trunk(str(tmp_path), TrunkOptions())
    with pytest.raises(UserError, match="it ran"):
        load_trunk(str(tmp_path), TrunkOptions(trust_remote_code=True))
