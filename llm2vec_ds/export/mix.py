"""Several encoders of one shape → one: their weights mixed, in a line or along the arc between two."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.durable import replace_json

log = logging.getLogger(__name__)

METHODS = ("linear", "slerp")
Tensors = dict[str, torch.Tensor]
Measure = Callable[[Encoder], tuple[str, float]]
"""What is measured, and the encoder's score."""
STRAIGHT = 1e-4
"""Angle in radians below which an arc is a line."""


@dataclass(frozen=True)
class Point:
    """Score of a mixture with these weights."""

    weights: list[float]
    score: float


def mix(
    sources: Sequence[str],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    measure: Measure | None = None,
    n_points: int = 11,
) -> list[Point]:
    """Writes `output`: an encoder with pooling, template and tokenizer of the first source, in fp32.

    Args:
        sources: folders of encoders or runs, or LLMs (folder or hub id), which come without training.
        weights: one a source, 1 together; None: equal ones, or with `measure` the best of the curve.
        measure: draws the curve over the weights of two sources, from the first alone to the second alone.
        n_points: of the curve.

    Returns:
        The curve, or the one point that was measured; nothing without `measure`. `output/merge.json` has it.

    Raises:
        UserError: a wrong option, or sources of different shapes; or `output` is there.
    """
    _check(sources, output, weights, method, measure)
    encoder = _load(sources[0], None)
    states = [_state(encoder), *(_state(_load(source, encoder)) for source in sources[1:])]
    for source, state in zip(sources[1:], states[1:], strict=True):
        _check_shapes(sources[0], states[0], source, state)
    chosen = [list(weights)] if weights else []
    if not chosen and measure is not None:
        chosen = [[1 - i / (n_points - 1), i / (n_points - 1)] for i in range(n_points)]
    points, measured = [], None
    for own in chosen:
        if measure is None:
            break
        encoder.trunk.load_state_dict(mixed(states, own, method))
        measured, score = measure(encoder)
        points.append(Point(own, score))
        log.info("weights %s: %.4f", ", ".join(f"{w:.2f}" for w in own), points[-1].score)
    best = max(points, key=lambda point: point.score).weights if points else None
    final = best or (chosen[0] if chosen else [1 / len(sources)] * len(sources))
    encoder.trunk.load_state_dict(mixed(states, final, method))
    encoder.save(output)
    values = {
        "sources": list(sources),
        "method": method,
        "weights": final,
        "measured": measured,
        "curve": [*map(asdict, points)],
    }
    replace_json(output / "merge.json", values)
    return points


def mixed(states: Sequence[Tensors], weights: Sequence[float], method: str) -> Tensors:
    """Σ w_k · A_k, or with `slerp` each tensor of two on the arc between them (Shoemake, 1985, equation 2 of
    section 3.3): sin((1−t)θ)/sin θ · A + sin(tθ)/sin θ · B, with t the second weight, and θ the angle."""
    return {name: _mixed([state[name] for state in states], weights, method) for name in states[0]}


def _mixed(tensors: Sequence[torch.Tensor], weights: Sequence[float], method: str) -> torch.Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first
    factors = list(weights)
    if method == "slerp":
        a, b = (tensor.double().flatten() for tensor in tensors)
        angle = math.acos(float((a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).clamp(-1, 1)))
        if STRAIGHT < angle < math.pi - STRAIGHT:
            factors = [math.sin(weight * angle) / math.sin(angle) for weight in weights]
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, factor in zip(tensors, factors, strict=True):
        total += factor * tensor.double()
    return total.to(first.dtype)


def _check(
    sources: Sequence[str],
    output: Path,
    weights: Sequence[float] | None,
    method: str,
    measure: Measure | None,
) -> None:
    if method not in METHODS:
        raise UserError(f"--method {method!r} is unknown: choose {' or '.join(METHODS)}")
    if method == "slerp" and len(sources) != 2:
        raise UserError(f"--method slerp lies between two encoders, not {len(sources)}: use linear")
    if measure is not None and weights is None and len(sources) != 2:
        raise UserError(f"--evaluate draws a curve between two encoders, not {len(sources)}: give --weights")
    if weights is not None and len(weights) != len(sources):
        raise UserError(f"--weights has {len(weights)} numbers for {len(sources)} encoders: give one each")
    if weights is not None and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"--weights add up to {sum(weights):g}: make it 1")
    if output.exists():
        raise UserError(f"{output} is there already: choose another --output")


def _load(source: str, like: Encoder | None) -> Encoder:
    causal = None if like is None else like.causal
    return Encoder.from_pretrained(source, precision="fp32", device="cpu", causal=causal)


def _state(encoder: Encoder) -> Tensors:
    return {name: tensor.clone() for name, tensor in encoder.trunk.state_dict().items()}


def _check_shapes(first: str, one: Tensors, second: str, other: Tensors) -> None:
    if missing := sorted(one.keys() ^ other.keys()):
        raise UserError(f"{first} and {second} are of different shapes: only one has {missing[0]}")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            raise UserError(
                f"{first} and {second} are of different shapes: {name} is {list(tensor.shape)} and "
                f"{list(other[name].shape)}"
            )
