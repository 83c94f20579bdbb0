"""A recording proves itself before it is used: the same gradients as the pass that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.model.graphs.trunk import GraphedTrunk

LARGEST_ERROR = 1e-3
"""‖replayed − eager‖ / ‖eager‖ of every gradient. Kernels that add in varying order differ by less."""
SEED = 5


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
    """Compares hidden states of each batch, and the gradients that all of them together leave.

    The trunk is in training mode, and the `.grad` of what trains is there; it is zero afterwards. Torch's
    generators are left as they were.
    """
    device = next(trunk.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        expected = _outcome(trunk, graphed.filled, batches)
        found = _outcome(trunk, graphed, batches)
    _zero_gradients(trunk)
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return Proof(worst, errors[worst])


def _outcome(
    trunk: nn.Module, run: Callable[[PackedBatch], torch.Tensor], batches: Sequence[PackedBatch]
) -> dict[str, torch.Tensor]:
    _zero_gradients(trunk)
    outcome = {}
    for number, batch in enumerate(batches):
        torch.manual_seed(SEED + number)
        hidden_TD = run(batch)
        generator = torch.Generator().manual_seed(SEED + number)
        weight_TD = torch.randn(hidden_TD.shape, generator=generator).to(hidden_TD)
        (hidden_TD * weight_TD).sum().backward()
        outcome[f"hidden states of batch {number}"] = hidden_TD.detach()
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
