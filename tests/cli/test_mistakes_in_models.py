"""Models that no recipe can start from: what `train` and `prepare` say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from tests.support.in_process import assert_reads, error_line, run
from tests.support.mistakes import Mistake
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import tiny_tokenizer


def quantised_config(method: str) -> bytes:
    section = {"quant_method": method, "bits": 4, "group_size": 128}
    return json.dumps({"model_type": "llama", "quantization_config": section}).encode()


MISTAKES = {
    "no model folder": Mistake(
        "model 'TMP/none' cannot be loaded: there is no such folder, and a hub id has the form owner/name",
        changes={"model": {"path": "TMP/none"}},
    ),
    "hub model without network": Mistake(
        "model 'owner/name' cannot be loaded: there is no such folder, and …: give a folder, or connect to "
        "the network",
        changes={"model": {"path": "owner/name"}},
    ),
    "folder without weights": Mistake(
        "model 'TMP/llama' cannot be loaded: … no file named model.safetensors…",
        changes={"model": {"path": "TMP/llama"}},
    ),
    "broken weights": Mistake(
        "model 'TMP/llama' cannot be loaded: … header …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/model.safetensors": b"half a file"},
    ),
    "weights that are a pickle with code": Mistake(
        "model 'TMP/llama' cannot be loaded: its weights are a pickle that is damaged or holds more than "
        "tensors, and nothing in it was run: use a copy of the model with weights in safetensors",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/pytorch_model.bin": b"cos\ngetcwd\n(tR."},
    ),
    "empty weights": Mistake(
        "model 'TMP/llama' cannot be loaded: its weights are a pickle that is damaged …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/pytorch_model.bin": b""},
    ),
    "quantised weights without their package": Mistake(
        "model 'TMP/llama': its weights are quantised by gptq, which cannot be read: use the original "
        "model, …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": quantised_config("gptq")},
    ),
    "quantised weights of another package": Mistake(
        "model 'TMP/llama': its weights are quantised by awq, which cannot be read: use the original "
        "model, …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": quantised_config("awq")},
    ),
    "a model of its own code": Mistake(
        "model 'TMP/llama' cannot be loaded: it needs its own code, and only a recipe (of train, prepare "
        "or plan) can allow that: read the code, then set model.trust_remote_code=true",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'},
    ),
    "falcon": Mistake(
        "model type 'falcon' cannot be made bidirectional: transformers gives FalconModel no is_causal "
        "switch. Use a type that has it, such as llama, mistral, qwen3 or gemma, or a newer transformers",
        changes={"model": {"path": "TMP/falcon"}},
    ),
    "slow tokenizer": Mistake(
        "ByT5Tokenizer gives no character offsets: use a model with a tokenizer.json (a fast tokenizer), or "
        "convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        ("prepare", "RECIPE"),
        {"model": {"path": "TMP/byt5"}},
    ),
    "mask token": Mistake(
        "mntp.mask_token 'zzz zzz' is 7 tokens of this tokenizer: choose a string that is one, such as '_' "
        "or '<mask>'",
        changes={"mntp": {"mask_token": "zzz zzz"}},
        stage="mntp",
    ),
    "layers without adapters": Mistake(
        "adapter.target_modules: 'query' matches nothing in this trunk …; linear layers here: down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        changes={"adapter": {"target_modules": ["query"]}},
    ),
}


@pytest.fixture
def other_models(tmp_path: Path) -> None:
    """Folders that look like models: a Llama without weights, a falcon, a slow tokenizer."""
    for name in ("llama", "falcon"):
        AutoConfig.for_model(name).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    from transformers import ByT5Tokenizer

    AutoConfig.for_model("llama").save_pretrained(tmp_path / "byt5")
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")


@pytest.mark.usefixtures("other_models")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (
            "GatedRepoError",
            "model 'owner/name' cannot be loaded: it is gated: accept its terms at "
            "https://huggingface.co/owner/name, then run `hf auth login` or set HF_TOKEN",
        ),
        (
            "RepositoryNotFoundError",
            "model 'owner/name' cannot be loaded: there is no such folder, and no such model on the hub (a "
            "private one needs `hf auth login`)",
        ),
    ],
)
def test_what_the_hub_refuses(
    refusal: str,
    expected: str,
    tmp_path: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hub's client answers as it would; transformers wraps that in its own OSError."""
    from huggingface_hub import errors
    from transformers.utils import hub

    def refuse(*_: object, **__: object) -> None:
        raise getattr(errors, refusal)("401 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    values = recipe("mntp", Path("owner/name"), texts_file, tmp_path / "run")
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(error_line(capsys), expected)
