"""Estimates how long a step takes, from its operations and an assumed or fitted speed:

seconds = operations / operations_per_s + passes · pass_s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import MachineConfig

UTILISATION = 0.4
"""Assumed share of the data sheet's speed that matrix products of this size reach."""


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step."""

    operations: float
    passes: int
    """Number of forward passes. The embedding cache runs each micro-batch twice."""


@dataclass(frozen=True)
class Speed:
    operations_per_s: float
    pass_s: float = 0.0
    """Seconds that every pass takes besides its matrix products, whatever its size."""

    def seconds(self, work: Work) -> float:
        return work.operations / self.operations_per_s + work.passes * self.pass_s


@dataclass(frozen=True)
class Fit:
    """A speed, and its errors: |predicted − measured| / measured, over the measured steps."""

    speed: Speed
    n_steps: int
    n_runs: int
    median_error: float
    error_of_90_percent: float
    left_out_error: float | None
    """Median error on runs that the fit has not seen. Each run is left out in turn. None for a single run."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step. The total adds compute and communication, although they overlap in part."""

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
    """Returns the operations of one rank's step.

    Forward takes two operations for each weight and token: a multiplication and an addition. Attention takes
    four for each pair of tokens of a text and each component: two for the scores, two for the weighted sum.

    Args:
        n_tokens: tokens of one rank in a step.
        tokens_per_text: length of the texts, all taken as equally long.
        cached: True if forward runs once more, for the embedding cache.
        linear_parameters: weights of the trunk's linear layers, without embeddings.
        attention_width: heads · head dim, summed over layers.
        head_parameters: weights of the language head.
        head_rows: rows that the language head runs on, forward and backward.
    """
    forward = n_tokens * (2.0 * linear_parameters + 4.0 * tokens_per_text * attention_width)
    # Backward is one forward for the gradient of the inputs, and one for that of the weights if they train.
    backward = 2 if recipe.adapter is None else 1
    again = 1 if recipe.model.activation_checkpointing == "full" else 0
    # The head takes two a weight and row for the logits, and two for the gradient of the hidden states. If
    # its weight trains, backward computes the logits again and then that weight's gradient.
    head = 8.0 if recipe.adapter is None else 4.0
    return forward * ((2 if cached else 1) + backward + again) + head_rows * head * head_parameters


def fit_speed(runs: Sequence[Sequence[tuple[Work, float]]]) -> Fit:
    """Fits a speed by least squares of the relative errors of all steps.

    Relative errors let short and long steps count alike.

    Args:
        runs: the steps of each run: the work, and the seconds it took.

    Raises:
        ValueError: there is no step.
    """
    steps = [step for run in runs for step in run]
    if not steps:
        raise ValueError("there is no step to fit to: give at least one")
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
    # Solves operations / speed + passes · pass_s = seconds, each equation divided by its seconds. So every
    # right side is 1, and residuals are relative errors.
    seconds = np.array([s for _, s in steps])
    tera = np.array([work.operations for work, _ in steps]) / 1e12 / seconds
    passes = np.array([work.passes for work, _ in steps]) / seconds
    both, _, independent, _ = np.linalg.lstsq(np.stack([tera, passes], 1), np.ones(len(steps)), rcond=None)
    if independent == 2 and (both > 0).all():
        return Speed(1e12 / float(both[0]), float(both[1]))
    # If all steps are alike, or noise gives a negative value, only the rate is fitted and pass_s is 0.
    return Speed(1e12 * float(tera @ tera) / float(tera.sum()))


def _errors(speed: Speed, steps: Sequence[tuple[Work, float]]) -> np.ndarray:
    return np.array([abs(speed.seconds(work) / seconds - 1) for work, seconds in steps])
