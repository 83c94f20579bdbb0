"""The cached gradient is the gradient, dropout included."""

from __future__ import annotations

import copy

import pytest
import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors
from llm2vec_ds.objectives.embedding_cache import ScaledEncoder, vectors_loss_backward
from llm2vec_ds.recipe.objectives import ContrastiveConfig
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_trunk import trunk

ROWS = [row for row in texts((6, 4, 9, 2, 5, 3)) for _ in range(2)]
SEEDS = [11, 12, 13, 14]


# A low scale and pairs of different texts, so that the gradient is far from zero.
CONFIG = ContrastiveConfig(scale=2.0, learn_scale=True)


def encoder(dropout: float) -> ScaledEncoder:
    inner = Encoder(trunk(attention_dropout=dropout), tiny_tokenizer())
    return ScaledEncoder(inner, CONFIG.scale, learn_scale=CONFIG.learn_scale).train()


def loss_share(vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(len(vectors) // 2)
    pairs = PairVectors(vectors[0::2], vectors[1::2].roll(1, 0), vectors[:0], ids, ids, ids[:0])
    share, *_ = ContrastiveLoss(CONFIG)(pairs, scale)
    return share


def cached(
    model: ScaledEncoder, batches: list[PackedBatch], n_passes: int
) -> tuple[torch.Tensor, list[tuple[int, bool]]]:
    calls = []

    def backward(scalar: torch.Tensor, index: int, last: bool) -> None:
        calls.append((index, last))
        scalar.backward()

    _, share = vectors_loss_backward(model, batches, SEEDS, loss_share, backward, n_passes=n_passes)
    return share, calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("extra_passes", [0, 1])
def test_cached_equals_one_graph_over_all_micro_batches(dropout: float, extra_passes: int) -> None:
    model = encoder(dropout)
    plain = copy.deepcopy(model)
    batches = [pack(ROWS[i : i + 4]) for i in (0, 4, 8)]
    share, calls = cached(model, batches, 3 + extra_passes)
    assert calls == [(0, False), (1, False), (2, not extra_passes), *([(0, True)] * extra_passes)]

    vectors = []
    for seed, batch in zip(SEEDS, batches, strict=False):
        torch.manual_seed(seed)
        own, scale = plain(batch)
        vectors.append(own)
    expected = loss_share(torch.cat(vectors), scale)
    expected.backward()
    torch.testing.assert_close(share, expected.detach())
    largest = max(p.grad.abs().max() for p in plain.parameters())
    assert largest > 1e-3
    assert plain.log_gain.grad.abs() > 1e-3  # type: ignore[union-attr]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_one_micro_batch_runs_one_forward() -> None:
    model, forwards = encoder(0.3), []
    model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    _, calls = cached(model, [pack(ROWS)], 1)
    assert forwards == [True]
    assert calls == [(0, True)]


def test_micro_batches_do_not_change_the_gradient() -> None:
    model = encoder(0.0)
    other = copy.deepcopy(model)
    cached(model, [pack(ROWS[i : i + 4]) for i in (0, 4, 8)], 3)
    cached(other, [pack(ROWS)], 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
