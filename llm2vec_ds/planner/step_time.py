"""How long a step takes: an estimate from its operations, with an assumed speed or a fitted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import MachineConfig

UTILISATION = 0.4
"""Share of the data sheet's speed that matrix products of this size reach: an assumption."""


@dataclass(frozen=True)
class Work:
    """What one rank computes in a step."""

    operations: float
    passes: int
    """Micro-batches that run forward, each of them as often as it does."""


@dataclass(frozen=True)
class Speed:
    operations_per_s: float
    pass_s: float = 0.0
    """What a pass takes beside its products, whatever its size."""

    def seconds(self, work: Work) -> float:
        return work.operations / self.operations_per_s + work.passes * self.pass_s


@dataclass(frozen=True)
class Fit:
    """A speed, and how far measured steps are from it (relative, of the measured time)."""

    speed: Speed
    n_steps: int
    n_runs: int
    median_error: float
    error_of_90_percent: float
    left_out_error: float | None
    """Median over steps of a run that the fit had not seen, each run in turn; None for a single run."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds; compute and communication are added, though they overlap in part."""

    compute_ms: float
    communication_ms: float

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.communication_ms


def assumed_speed(machine: MachineConfig) -> Speed:
    return Speed(machine.tflops * 1e12 * UTILISATION)


def operations(
    recipe: Recipe,
    n_tokens: float,
    tokens_per_text: float,
    *,
    cached: bool,
    linear_parameters: int,
    attention_width: int,
    head_parameters: int,
    head_rows: float,
) -> float:
    """Two for each weight and token, four for each pair of tokens of a text and attention width.

    Args:
        n_tokens: of one rank in a step. tokens_per_text: their length, all taken for equal.
        cached: forward runs once more, for the embedding cache.
        linear_parameters: of the trunk, embeddings left out.
        attention_width: heads · head dim, summed over layers.
        head_parameters: of the language head, which runs on `head_rows` rows, forward and backward.
    """
    forward = n_tokens * (2.0 * linear_parameters + 4.0 * tokens_per_text * attention_width)
    backward = 2 if recipe.adapter is None else 1  # frozen weights have no gradient of their own
    again = 1 if recipe.model.activation_checkpointing == "full" else 0
    return forward * ((2 if cached else 1) + backward + again) + head_rows * 4.0 * head_parameters


def fit_speed(runs: Sequence[Sequence[tuple[Work, float]]]) -> Fit:
    """Least squares of the relative errors of all steps.

    Args:
        runs: for each, its steps: the work and the seconds it took.

    Raises:
        ValueError: no step.
    """
    steps = [step for run in runs for step in run]
    if not steps:
        raise ValueError("there is no step to fit to")
    speed = _fitted(steps)
    errors = _errors(speed, steps)
    left_out: list[float] = []
    if len(runs) > 1:
        for number, run in enumerate(runs):
            others = [step for other in (*runs[:number], *runs[number + 1 :]) for step in other]
            left_out += _errors(_fitted(others), run).tolist()
    return Fit(
        speed,
        len(steps),
        len(runs),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
        float(np.median(left_out)) if left_out else None,
    )


def _fitted(steps: Sequence[tuple[Work, float]]) -> Speed:
    seconds = np.array([s for _, s in steps])
    tera = np.array([work.operations for work, _ in steps]) / 1e12 / seconds
    passes = np.array([work.passes for work, _ in steps]) / seconds
    both, _, independent, _ = np.linalg.lstsq(np.stack([tera, passes], 1), np.ones(len(steps)), rcond=None)
    if independent == 2 and (both > 0).all():
        return Speed(1e12 / float(both[0]), float(both[1]))
    # Steps that are all alike, or noise: a time of its own for a pass cannot be told.
    return Speed(1e12 * float(tera @ tera) / float(tera.sum()))


def _errors(speed: Speed, steps: Sequence[tuple[Work, float]]) -> np.ndarray:
    return np.array([abs(speed.seconds(work) / seconds - 1) for work, seconds in steps])
