"""Proves recordings before they are used: a replay must give the gradients of the pass that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.model.graphs.trunk import GraphedTrunk

LARGEST_ERROR = 1e-3
"""The limit of ‖replayed − eager‖ / ‖eager‖. Kernels that add in a varying order differ by less."""
SEED = 5
STIR = 0.02
"""Scale of the random numbers that are added to the weights. LoRA's weights have this size after some
training."""


class Proof(NamedTuple):
    """The tensor that differs most between replays and filled eager passes, and its relative error."""

    worst: str
    error: float

    @property
    def holds(self) -> bool:
        return self.error <= LARGEST_ERROR  # false for NaN

    def __str__(self) -> str:
        return "to the bit" if self.error == 0 else f"to {self.error:.1e} (most in {self.worst})"


def prove(trunk: nn.Module, graphed: GraphedTrunk, batches: Sequence[PackedBatch]) -> Proof:
    """Compares replays with eager passes over the same batches.

    Compares the hidden states of each batch, with and without gradient, and the summed gradients of all
    batches. The first batch runs again at the end: then a recording is replayed with other dropout.

    The trunk must be in training mode, and trained parameters must have a `.grad`, which is zero afterwards.
    Weights and torch's generators are left as they were.
    """
    device = next(trunk.parameters()).device
    rounds = [*batches, batches[0]]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _stirred(trunk):
        expected = _outcome(trunk, graphed.filled, rounds)
        found = _outcome(trunk, graphed, rounds)
    _zero_gradients(trunk)
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return Proof(worst, errors[worst])


@contextmanager
def _stirred(trunk: nn.Module) -> Iterator[None]:
    """Adds random numbers to the trained weights in this context.

    LoRA's B starts at zero. Then the gradient of A is zero too, and an error in it would not show.
    """
    kept = {name: parameter.detach().clone() for name, parameter in _trained(trunk)}
    torch.manual_seed(SEED)
    with torch.no_grad():
        for _, parameter in _trained(trunk):
            parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=STIR)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in _trained(trunk):
                parameter.copy_(kept[name])


def _outcome(
    trunk: nn.Module, run: Callable[[PackedBatch], torch.Tensor], batches: Sequence[PackedBatch]
) -> dict[str, torch.Tensor]:
    """Returns hidden states and gradients of all batches.

    Backward runs in this thread, as it does in a recording. Another thread has other handles of CUDA's
    libraries.
    """
    _zero_gradients(trunk)
    outcome = {}
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(SEED + number)
        with torch.autograd.set_multithreading_enabled(False):
            torch.manual_seed(SEED + number)
            hidden_TD = run(batch)
            weight_TD = torch.randn(hidden_TD.shape, generator=generator).to(hidden_TD)
            (hidden_TD * weight_TD).sum().backward()
        outcome[f"hidden states of batch {number}"] = hidden_TD.detach()
    for number, batch in enumerate(batches):
        torch.manual_seed(SEED + number)
        with torch.no_grad():
            outcome[f"hidden states of batch {number} without gradient"] = run(batch)
    gradients = {name: p.grad.clone() for name, p in _trained(trunk) if p.grad is not None}
    return outcome | gradients


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).norm()
    if not bool(difference > 0):
        return float(difference)  # 0, or NaN
    return float(difference / expected.float().norm())


def _zero_gradients(trunk: nn.Module) -> None:
    for _, parameter in _trained(trunk):
        if parameter.grad is not None:
            parameter.grad.zero_()


def _trained(trunk: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in trunk.named_parameters() if p.requires_grad]
