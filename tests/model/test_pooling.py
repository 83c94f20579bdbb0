"""Every pooling over packed rows equals a loop over texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.recipe.recipe import Recipe, documented_keys


def by_loop(name: str, hidden: torch.Tensor, texts: list[TokenizedText]) -> torch.Tensor:
    vectors, first = [], 0
    for text in texts:
        own = hidden[first : first + len(text)]
        pooled = own[text.pool_start : text.pool_end]
        ramp = torch.arange(1.0, len(pooled) + 1, dtype=hidden.dtype)
        vectors.append(
            {
                "mean": pooled.mean(0),
                "weighted_mean": (pooled * ramp[:, None]).sum(0) / ramp.sum(),
                "last": pooled[-1],
                "eos": own[-1],
                "bos": own[0],
            }.get(name)
        )
        assert vectors[-1] is not None, f"add {name} to by_loop"
        first += len(text)
    return torch.stack(vectors)


@st.composite
def spans(draw: st.DrawFn) -> list[TokenizedText]:
    texts = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        start = draw(st.integers(0, length - 1))
        texts.append(TokenizedText([1] * length, start, draw(st.integers(start + 1, length)), 0))
    return texts


@pytest.mark.parametrize("name", POOLINGS)
@settings(max_examples=40)
@given(texts=spans())
def test_packed_equals_a_loop_with_gradients(name: str, texts: list[TokenizedText]) -> None:
    batch = pack(texts)
    hidden = torch.randn(batch.n_tokens, 3, dtype=torch.float64, requires_grad=True)
    ours, expected = POOLINGS[name](hidden, batch), by_loop(name, hidden, texts)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", POOLINGS)
def test_each_is_a_key_that_is_described(name: str) -> None:
    (meaning,) = [meaning for key, _, meaning in documented_keys() if key == "pooling"]
    assert f"`{name}`" in meaning


@pytest.mark.parametrize("name", POOLINGS)
def test_half_precision_is_pooled_in_fp32(name: str) -> None:
    batch = pack([TokenizedText([1, 2, 3], 1, 3, 0)])
    assert POOLINGS[name](torch.randn(3, 4, dtype=torch.bfloat16), batch).dtype == torch.float32


def test_recipes_know_every_pooling() -> None:
    assert set(Recipe.model_fields["pooling"].annotation.__args__) == set(POOLINGS)  # type: ignore[union-attr]
