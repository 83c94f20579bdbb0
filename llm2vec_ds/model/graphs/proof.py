"""A recording proves itself before it is used: the same gradients as the pass that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.model.graphs.trunk import GraphedTrunk

LARGEST_ERROR = 1e-3
"""‖replayed − eager‖ / ‖eager‖ of every gradient. Kernels that add in varying order differ by less."""
SEED = 5
STIR = 0.02
"""Of the size of LoRA's weights after some training."""


class Proof(NamedTuple):
    """What differs most between replays and the filled passes themselves."""

    worst: str
    error: float

    @property
    def holds(self) -> bool:
        return self.error <= LARGEST_ERROR  # which a NaN is not

    def __str__(self) -> str:
        return "to the bit" if self.error == 0 else f"to {self.error:.1e} (most in {self.worst})"


def prove(trunk: nn.Module, graphed: GraphedTrunk, batches: Sequence[PackedBatch]) -> Proof:
    """Compares hidden states of each batch, with and without gradient, and the gradients that all of them
    together leave. The first one comes again at the end: a replay sees other dropout then.

    The trunk is in training mode, and the `.grad` of what trains is there; it is zero afterwards. Weights and
    torch's generators are left as they were.
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
    """Adds random numbers to what trains: LoRA's B starts at zero, and hides what comes before it."""
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
    """Backward in this thread, as in a recording: another one has other handles of CUDA's libraries."""
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
