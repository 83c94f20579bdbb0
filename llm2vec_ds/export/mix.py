"""Mixes the weights of several encoders of the same shape: linearly, or along the arc between two (slerp)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.merged_folder import check_merged_folder, save_merged

log = logging.getLogger(__name__)

N_POINTS = 11
METHODS = ("linear", "slerp")
Tensors = dict[str, torch.Tensor]
Measure = Callable[[Encoder], tuple[str, float]]
"""Returns the name of what is measured, and the encoder's score."""
STRAIGHT = 1e-4
"""An angle below this, in radians, counts as straight: slerp then mixes linearly."""


@dataclass(frozen=True)
class Point:
    """The score of a mixture with these weights."""

    weights: list[float]
    score: float


def mix(
    sources: Sequence[str],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    measure: Measure | None = None,
    overwrite: bool = False,
) -> list[Point]:
    """Writes the mixed encoder to `output`, in fp32. The first source gives pooling, template and tokenizer.

    Args:
        sources: folders of encoders or runs, or untrained LLMs (folder or hub id).
        weights: one for each source, 1 in total. None: equal weights, or with `measure` the best of the
            curve.
        measure: measures the mixture. Without `weights`, it measures N_POINTS mixtures of two sources, from
            only the first to only the second.

    Returns:
        The curve, or the one point that was measured; [] without `measure`. `output/merge.json` has it, too.

    Raises:
        UserError: an option is wrong, the sources have different shapes, or `output` exists and `overwrite`
            is false.
    """
    _check(sources, weights, method, measure)
    check_merged_folder(output, sources, overwrite)
    encoder = _load(sources[0], None)
    states = [_state(encoder), *(_state(_load(source, encoder)) for source in sources[1:])]
    for source, state in zip(sources[1:], states[1:], strict=True):
        _check_shapes(sources[0], states[0], source, state)
    chosen = [list(weights)] if weights else []
    if not chosen and measure is not None:
        chosen = [[1 - share, share] for share in (i / (N_POINTS - 1) for i in range(N_POINTS))]
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
    note = {
        "sources": list(sources),
        "method": method,
        "weights": final,
        "measured": measured,
        "curve": [*map(asdict, points)],
    }
    save_merged(encoder, output, note=note)
    return points


def mixed(states: Sequence[Tensors], weights: Sequence[float], method: str) -> Tensors:
    """Returns Σ w_k · A_k for each tensor. With `slerp`, each tensor lies on the arc between two:

    sin((1−t)θ)/sin θ · A + sin(tθ)/sin θ · B, where t is the second weight and θ the angle between A and B
    (Shoemake, 1985, equation 2 of section 3.3).
    """
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
    sources: Sequence[str], weights: Sequence[float] | None, method: str, measure: Measure | None
) -> None:
    if method not in METHODS:
        raise UserError(f"--method {method!r} is unknown: choose {' or '.join(METHODS)}")
    if method == "slerp" and len(sources) != 2:
        raise UserError(f"--method slerp mixes two encoders, not {len(sources)}: use linear")
    if measure is not None and weights is None and len(sources) != 2:
        raise UserError(f"--evaluate finds weights for two encoders, not {len(sources)}: give --weights")
    if weights is not None and len(weights) != len(sources):
        raise UserError(
            f"--weights has {len(weights)} number(s) for {len(sources)} encoders: give one for each encoder"
        )
    if weights is not None and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"--weights add up to {sum(weights):g}: make them add up to 1")


def _load(source: str, like: Encoder | None) -> Encoder:
    causal = None if like is None else like.causal
    return Encoder.from_pretrained(source, precision="fp32", device="cpu", causal=causal)


def _state(encoder: Encoder) -> Tensors:
    return {name: tensor.clone() for name, tensor in encoder.trunk.state_dict().items()}


def _check_shapes(first: str, one: Tensors, second: str, other: Tensors) -> None:
    if missing := sorted(one.keys() ^ other.keys()):
        raise UserError(
            f"{first} and {second} have different shapes (only one has {missing[0]}): mix encoders of one "
            "base model"
        )
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            raise UserError(
                f"{first} and {second} have different shapes ({name} is {list(tensor.shape)} and "
                f"{list(other[name].shape)}): mix encoders of one base model"
            )
