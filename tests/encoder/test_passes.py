"""Passes that suit the device, halved where memory is full, and what runs ahead of what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llm2vec_ds.encoder import encoder as encoder_module
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.passes import (
    CPU_TOKENS,
    GPU_TOKENS,
    HalvedWhereFull,
    made_ahead,
    one_ahead,
    tokens_of_a_pass,
)
from tests.support.tiny import sentences, tiny_tokenizer
from tests.support.tiny_trunk import trunk


def test_a_gpu_takes_more_at_once() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (tokens_of_a_pass(cpu), tokens_of_a_pass(gpu)) == (CPU_TOKENS, GPU_TOKENS)
    assert tokens_of_a_pass(gpu, 7) == 7


def limited(most: int, lengths: list[int]) -> tuple[HalvedWhereFull, list[int]]:
    """A device that holds `most` tokens, and the tokens of each pass that was tried."""
    tried: list[int] = []

    def run(_: Any, group: np.ndarray) -> torch.Tensor:
        tried.append(sum(lengths[i] for i in group))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.from_numpy(group)

    return HalvedWhereFull(run, lengths), tried


def test_full_memory_halves_this_pass_and_the_later_ones(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [10] * 16
    passes, tried = limited(40, lengths)
    first, second = np.arange(8), np.arange(8, 16)
    assert passes(None, first).tolist() == first.tolist()
    assert passes(None, second).tolist() == second.tolist()
    assert tried == [80, 40, 40, 40, 40]
    assert "passes of at most 40 tokens from here on" in caplog.text


def test_a_text_that_does_not_fit_alone_is_an_error() -> None:
    passes, tried = limited(9, [10, 10])
    with pytest.raises(torch.OutOfMemoryError):
        passes(None, np.arange(2))
    assert tried == [20, 10]


def test_what_one_asks_for_is_not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(trunk(), tiny_tokenizer())
    texts = sentences(8)
    expected = encoder.encode(texts)
    plain = encoder_module.trunk_hidden_states

    def small(own: Any, batch: Any) -> torch.Tensor:
        if batch.n_texts > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(own, batch)

    monkeypatch.setattr(encoder_module, "trunk_hidden_states", small)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(texts, micro_batch_tokens=CPU_TOKENS)


def test_the_next_is_made_before_this_one_is_used() -> None:
    said: list[str] = []

    def items() -> Iterator[int]:
        for number in range(3):
            said.append(f"made {number}")
            yield number

    for number in one_ahead(items()):
        said.append(f"used {number}")
    assert said == ["made 0", "made 1", "used 0", "made 2", "used 1", "used 2"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_error_of_what_runs_ahead_comes_in_its_turn(device: str) -> None:
    found = made_ahead(lambda x: 6 // x, [3, 2, 0, 1], torch.device(device))
    assert [next(found), next(found)] == [(3, 2), (2, 3)]
    with pytest.raises(ZeroDivisionError):
        next(found)
