"""The probe sees each way to be wrong, on a trunk that is right but for that; and types that are wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.attention import register
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.model.probe import checks, miniature, probe
from llm2vec_ds.model.probe.checks import Check, Differs
from llm2vec_ds.model.probe.first_layers import first_layers
from llm2vec_ds.model.probe.miniature import MOST_PARAMETERS, CannotBuild, layer_kind, layers_of, miniatures
from tests.support.model_types import SIZES, config_of
from tests.support.tiny import tiny_llama, tiny_tokenizer


def small_trunk(model_type: str = "llama", **changes: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 3, **changes})
    return next(miniatures(config, causal=False)).trunk(False, register())


def one_causal_layer(trunk: Any) -> None:
    trunk.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "is_causal": True}), with_kwargs=True
    )


def sees_its_neighbours(trunk: Any) -> None:
    trunk.layers[1].self_attn.register_forward_hook(
        lambda _, args, output: (output[0] + 0.1 * output[0].mean(1, keepdim=True), *output[1:])
    )


def remembers(trunk: Any) -> None:
    calls: list[int] = []

    def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output + 1e-3 * len(calls)

    trunk.norm.register_forward_hook(hook)


def forgets_padding(trunk: Any) -> None:
    trunk.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )


def mixes_nothing(trunk: Any) -> None:
    for layer in trunk.layers:
        layer.self_attn.register_forward_hook(lambda _, args, output: (0 * output[0], *output[1:]))


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (
            one_causal_layer,
            r"layers\.1\.self_attn \(LlamaAttention\) is not bidirectional: .* 0 of the 3 before",
        ),
        (
            sees_its_neighbours,
            "a text of 5 tokens has different hidden states beside texts of 7, 21, 31 tokens",
        ),
        (remembers, "a text of 5 tokens has different hidden states"),
        (forgets_padding, "a text of 5 tokens has different hidden states padded right"),
        (mixes_nothing, "no layer lets one token see another"),
    ],
)
def test_each_defect_is_seen(defect: Callable[[Any], None], words: str) -> None:
    trunk = small_trunk()
    Check(trunk).all(causal=False)
    defect(trunk)
    with pytest.raises(Differs, match=words):
        Check(trunk).all(causal=False)


def test_what_the_attention_ignores_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = small_trunk("mistral", sliding_window=4)
    Check(trunk).all(causal=False)
    Check(trunk).own_attention()
    monkeypatch.setattr("llm2vec_ds.model.attention._reach", lambda *_, **__: None)
    trunk = small_trunk("mistral", sliding_window=4)
    Check(trunk).all(causal=False)
    with pytest.raises(Differs, match="a text of 21 tokens has different hidden states by transformers' own"):
        Check(trunk).own_attention()


REFUSED = {
    "recurrent_gemma": r"rg_lru \(RecurrentGemmaRglru\) is not bidirectional",
    "minimax": r"self_attn \(MiniMaxLightningAttention\) is not bidirectional",
    "granitemoehybrid": r"mamba \(GraniteMoeHybridMambaLayer\) is not bidirectional",
    "lfm2": r"conv \(Lfm2ShortConv\) is not bidirectional",
    "nemotron": r"self_attn \(NemotronAttention\) is not bidirectional",
    "gpt_oss": r"cannot run on packed texts .*sinks",
    "doge": r"cannot run on packed texts",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_are_wrong_are_refused_before_weights_are_read(model_type: str, tmp_path: Path) -> None:
    config_of(model_type).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model type '{model_type}' is refused: .*{REFUSED[model_type]}"):
        load_trunk(str(tmp_path), TrunkOptions())


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_rope_by_the_longest_text_is_refused(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """longrope and dynamic as transformers compute them; chosen by text they are right."""
    config = config_of("phi3") if model_type == "phi3" else _dynamic_llama()
    assert probe._check_miniature(config, False, False)
    monkeypatch.setattr(miniature, "choose_rope_by_text", lambda trunk: None)
    with pytest.raises(UserError, match="has different hidden states beside texts of"):
        probe._check_miniature(config, False, False)


def _dynamic_llama() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return AutoConfig.for_model("llama", **SIZES, rope_parameters=rope)


KINDS = {
    "gemma3n_text": 5,  # sliding or full, with and without keys and values of an earlier layer, sparse or not
    "gemma4_text": 4,  # sliding or full, with and without keys and values of an earlier layer
    "qwen3_moe": 1,
    "deepseek_v3": 2,
    "llama4_text": 2,
    "afmoe": 3,
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_miniature_has_every_kind_of_layer(model_type: str) -> None:
    config = config_of(model_type)
    whole = miniature.on_meta(miniature.with_causal(config, False), False)
    small = next(miniatures(config, causal=False)).trunk(False, register())
    kinds = [{layer_kind(layer) for layer in layers_of(trunk)} for trunk in (whole, small)]
    Check(small).all(causal=False)
    assert len(kinds[0]) >= KINDS[model_type]
    assert kinds[0] <= kinds[1]
    assert (
        sum(p.numel() for p in small.parameters())
        <= MOST_PARAMETERS
        < sum(p.numel() for p in whole.parameters())
    )


def test_no_parameter_stays_at_what_it_begins_with() -> None:
    for name, parameter in small_trunk("gemma2", sliding_window=8).named_parameters():
        assert 0.05 < parameter.std() < 2, name


def test_a_probe_leaves_random_numbers_alone() -> None:
    config = tiny_llama().config
    state = torch.get_rng_state()
    probe._check_miniature(config, False, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_shown_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(tmp_path))
    config = tiny_llama(vocab_size=401).config
    assert probe.check_config(config, False)
    assert len(list((tmp_path / "probes").iterdir())) == 1
    monkeypatch.setattr(probe, "_checked", lambda *_: pytest.fail("it was tried again"))
    assert probe.check_config(config, False)
    for other in ((config, True), (tiny_llama(vocab_size=402).config, False)):
        with pytest.raises(pytest.fail.Exception, match="tried again"):
            probe.check_config(*other)
    monkeypatch.setattr(torch, "__version__", "0.0")
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        probe.check_config(config, False)


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_DS_CACHE", "/proc/nowhere")
    assert probe.check_config(tiny_llama(vocab_size=403).config, False)


def cannot_be_built(*_: Any) -> Any:
    raise CannotBuild("too large")
    yield


def test_without_a_miniature_the_first_layers_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probe, "miniatures", cannot_be_built)
    model = tiny_llama(vocab_size=404, num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO)
    trunk = load_trunk(str(tmp_path), TrunkOptions())
    assert len(trunk.layers) == 4
    assert "no miniature can be built (too large)" in caplog.text
    assert "its first layers are checked instead" in caplog.text
    one_causal_layer(trunk)
    with pytest.raises(UserError, match="layers.1.self_attn .* is not bidirectional"):
        probe.check_loaded(trunk, causal=False)
    assert len(trunk.layers) == 4


def test_the_first_layers_reach_to_the_last_kind() -> None:
    trunk = tiny_llama(vocab_size=404, num_hidden_layers=24).model
    trunk.layers[20].self_attn.is_special = True
    with first_layers(trunk):
        assert len(trunk.layers) == 22
    assert len(trunk.layers) == 24


def test_without_a_miniature_a_wrong_type_is_refused_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(probe, "miniatures", cannot_be_built)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron", **SIZES)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'nemotron' is refused: .* is not bidirectional"):
        load_trunk(str(tmp_path), TrunkOptions())


def test_texts_reach_beyond_every_limit() -> None:
    from llm2vec_ds.model.probe import small_config as limits

    assert limits.ROPE_SWITCH < limits.POSITIONS < checks.LONG
    assert checks.SHORT <= limits.CHUNK < checks.MIDDLE
    assert checks.SHORT <= limits.WINDOW // 2 < limits.WINDOW < checks.MIDDLE < limits.POSITIONS


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])  # a cap, a divisor, a factor
def test_a_linear_head_is_accepted(model_type: str) -> None:
    probe.check_head(config_of(model_type))


@pytest.mark.parametrize("model_type", ["bert", "electra", "modernbert-decoder"])
def test_a_head_with_more_than_a_linear_layer_is_refused(model_type: str) -> None:
    with pytest.raises(UserError, match=f"'{model_type}' has more than a linear language head"):
        probe.check_head(config_of(model_type))
