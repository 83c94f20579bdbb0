"""MNTP's loss against full logits in double precision."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder import Encoder
from llm2vec_ds.loss.mntp import MaskedTokenHead, MntpModel
from tests.model.test_equalities import texts, trunk
from tests.support.tiny import tiny_tokenizer


def labelled(rows: list[TokenizedText]) -> list[np.ndarray]:
    labels = []
    for row in rows:
        label = np.full(len(row), -100)
        label[1::2] = np.asarray(row.input_ids)[1::2]
        labels.append(label)
    return labels


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divisor", [1.0, 2.0])
def test_loss_and_gradients_equal_the_plain_computation(
    chunk: int, softcap: float | None, divisor: float
) -> None:
    model = trunk().double()
    linear = torch.nn.Linear(32, 400, bias=False).double()
    config = SimpleNamespace(final_logit_softcapping=softcap, logits_scaling=divisor)
    mntp = MntpModel(Encoder(model, tiny_tokenizer()), MaskedTokenHead(linear, config, chunk))
    rows, labels = texts(), labelled(texts())
    loss_M, hit_M, text_M = mntp(pack(rows, labels))

    expected, hits, owners = [], [], []
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        hidden = model(torch.tensor([row.input_ids]), use_cache=False).last_hidden_state[0]
        logits = linear(hidden) / divisor
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        for i in np.flatnonzero(label != -100):
            target = torch.tensor(label[i])
            expected.append(F.cross_entropy(logits[i - 1], target))
            hits.append(bool(logits[i - 1].argmax() == target))
            owners.append(number)
    parameters = [*model.parameters(), linear.weight]
    weight = torch.arange(1.0, len(expected) + 1)
    torch.testing.assert_close(loss_M.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert hit_M.tolist() == hits
    assert text_M.tolist() == owners
    ours = torch.autograd.grad((loss_M * weight).sum(), parameters)
    plain = torch.autograd.grad((torch.stack(expected) * weight).sum(), parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_masked_token_is_no_loss() -> None:
    mntp = MntpModel(
        Encoder(trunk(), tiny_tokenizer()), MaskedTokenHead(torch.nn.Linear(32, 400), SimpleNamespace(), 8)
    )
    loss_M, hit_M, _ = mntp(pack(texts(), [np.full(len(row), -100) for row in texts()]))
    assert loss_M.shape == hit_M.shape == (0,)
    loss_M.sum().backward()
