"""Padded left, padded right, packed and alone: the same vectors and the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.bidirectional import check_can_be_bidirectional
from llm2vec_ds.model.recomputation import Recomputation, recompute_activations
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_trunk import trunk


def packed_vectors(model: torch.nn.Module, rows: list[TokenizedText]) -> torch.Tensor:
    return Encoder(model, tiny_tokenizer())(pack(rows))


def padded_vectors(model: torch.nn.Module, rows: list[TokenizedText], side: str) -> torch.Tensor:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), 2)
    mask, pool = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row.input_ids)
        mask[i, start : start + len(row)] = 1
        pool[i, start + row.pool_start : start + row.pool_end] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return (hidden * pool[..., None]).sum(1) / pool.sum(1, keepdim=True)


def with_gradients(model: torch.nn.Module, vectors: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((vectors * weight).sum(), list(model.parameters()))
    return [vectors.detach(), *gradients]


def assert_same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert max(x.abs().max() for x in expected[1:]) > 1e-2
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rival", ["left", "right", "eager left", "sdpa right", "alone"])
def test_packed_equals(rival: str, causal: bool) -> None:
    model = trunk(causal)
    ours = with_gradients(model, packed_vectors(model, texts()))
    if rival == "alone":
        vectors = torch.cat([packed_vectors(model, [row]) for row in texts()])
    else:
        *implementation, side = rival.split()
        other = trunk(causal, *implementation)
        other.load_state_dict(model.state_dict())
        model = other
        vectors = padded_vectors(model, texts(), side)
    assert_same(ours, with_gradients(model, vectors))


def test_the_last_token_moves_the_first_and_the_reverse() -> None:
    rows = texts((6, 6))
    changed_last = copy.deepcopy(rows)
    changed_last[0].input_ids[-1] += 1  # type: ignore[index]
    changed_first = copy.deepcopy(rows)
    changed_first[0].input_ids[0] += 1  # type: ignore[index]
    for causal, moves in ((False, True), (True, False)):
        encoder = Encoder(trunk(causal), tiny_tokenizer())
        with torch.no_grad():
            before, last, first = (
                encoder.hidden_states(pack(r)) for r in (rows, changed_last, changed_first)
            )
        assert bool((before[0] - last[0]).abs().max() > 1e-4) is moves
        assert (before[5] - first[5]).abs().max() > 1e-4
        torch.testing.assert_close(before[6:], last[6:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(which: Recomputation) -> None:
    model = trunk()
    expected = with_gradients(model, packed_vectors(model, texts()))
    recompute_activations(model, which)
    model.train()
    assert_same(with_gradients(model, packed_vectors(model, texts())), expected)


@pytest.mark.parametrize("model_type", ["gptj", "falcon", "bloom", "mpt", "codegen"])
def test_types_without_the_switch_are_refused_by_name(model_type: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(model_type, vocab_size=50)
    for name, value in {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "rotary_dim": 4,
        "hidden_size": 16,
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(UserError, match=f"'{model_type}' cannot be made bidirectional"):
        check_can_be_bidirectional(model)
