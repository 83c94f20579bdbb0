"""MNTP's loss against full logits in double precision."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead, MntpModel
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_trunk import trunk


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
    loss_M, hit_M = mntp(pack(rows, labels))

    expected, hits = [], []
    for row, label in zip(rows, labels, strict=True):
        hidden = model(torch.tensor([row.input_ids]), use_cache=False).last_hidden_state[0]
        logits = linear(hidden) / divisor
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        for i in np.flatnonzero(label != -100):
            target = torch.tensor(label[i])
            expected.append(F.cross_entropy(logits[i - 1], target))
            hits.append(bool(logits[i - 1].argmax() == target))
    parameters = [*model.parameters(), linear.weight]
    weight = torch.arange(1.0, len(expected) + 1)
    torch.testing.assert_close(loss_M.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert hit_M.tolist() == hits
    ours = torch.autograd.grad((loss_M * weight).sum(), parameters)
    plain = torch.autograd.grad((torch.stack(expected) * weight).sum(), parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_masked_token_is_no_loss() -> None:
    mntp = MntpModel(
        Encoder(trunk(), tiny_tokenizer()), MaskedTokenHead(torch.nn.Linear(32, 400), SimpleNamespace(), 8)
    )
    loss_M, hit_M = mntp(pack(texts(), [np.full(len(row), -100) for row in texts()]))
    assert loss_M.shape == hit_M.shape == (0,)
    loss_M.sum().backward()


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 4)])
def test_a_frozen_head_takes_two_matrix_products(trained: bool, products: int) -> None:
    linear = torch.nn.Linear(16, 50).double().requires_grad_(trained)  # fp32 may be oneDNN's, not counted
    hidden, label = torch.randn(20, 16, dtype=torch.float64, requires_grad=True), torch.arange(20)
    with FlopCounterMode(display=False) as counter:
        loss, _ = MaskedTokenHead(linear, SimpleNamespace(), 8)(hidden, label)
        (loss * torch.linspace(0.1, 1.0, 20)).sum().backward()
    assert counter.get_total_flops() == products * 2 * 20 * 16 * 50
    exact = hidden.detach().double().requires_grad_()
    weight, bias = (x.detach().double().requires_grad_() for x in (linear.weight, linear.bias))
    plain = F.cross_entropy(F.linear(exact, weight, bias), label, reduction="none")
    (plain * torch.linspace(0.1, 1.0, 20)).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    for ours, expected in ((linear.weight, weight), (linear.bias, bias)):
        if trained:
            torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)
        else:
            assert ours.grad is None


PEAK = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead

def resident_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

linear = torch.nn.Linear(16, 32768, bias=False).requires_grad_(sys.argv[1] == "True")
head = MaskedTokenHead(linear, SimpleNamespace(final_logit_softcapping=30.0), 64)
def run(n):
    loss, _ = head(torch.randn(n, 16, requires_grad=True), torch.arange(n))
    loss.sum().backward()
run(64)
Path("/proc/self/clear_refs").write_text("5")
before = resident_mib("VmRSS")
run(2048)
print(resident_mib("VmHWM") - before)
"""


@pytest.mark.parametrize("trained", [False, True])
def test_memory_over_forward_and_backward_is_that_of_a_chunk(trained: bool) -> None:
    """2,048 × 32,768 logits are 256 MiB, a chunk of 64 rows 8 MiB."""
    line = [sys.executable, "-c", PEAK, str(trained)]
    steady = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    assert float(subprocess.check_output(line, text=True, env=steady)) <= 60
