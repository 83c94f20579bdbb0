"""Checks each step's numbers, and stops a run that learns nothing."""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice
from statistics import mean

from llm2vec_ds.distributed import rank
from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)

MANY_STEPS = 20
"""A run that has been dead for this many steps in a row is stopped. It would stay dead."""


class ProgressCheck:
    """Finds dead steps. A step is dead if its gradient is exactly zero, or if all its texts have one vector.

    The numbers are already on the host, and every rank has the same. So all ranks come to the same result.

    Args:
        n_steps: steps that this process will take.
        from_start: the run starts at step 1. A run that resumes has had gradients before, so a zero may mean
            that nothing is left to learn.
    """

    def __init__(self, n_steps: int, *, from_start: bool) -> None:
        # At least two steps: a single batch may have no negative, and then its gradient is zero.
        self._many_still = min(MANY_STEPS, max(2, n_steps))
        # The second half of a short run must be enough to judge it: if the learning rate is far too high, the
        # first steps still have different vectors.
        self._many_alike = min(MANY_STEPS, max(2, n_steps // 2))
        self._has_moved = not from_start
        self._n_still = self._n_alike = self._n_steps = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=MANY_STEPS)

    def look(self, step: int, *, loss: float, still: bool, vectors_alike: bool) -> None:
        """Checks the numbers of step `step`, before anything of it is saved.

        Args:
            still: the gradient was exactly zero.

        Raises:
            UserError: for many steps all vectors were equal. Or the run never had a gradient, for many steps.
        """
        self._n_steps += 1
        self._last.append(loss)
        if len(self._first) < MANY_STEPS:
            self._first.append(loss)
        self._n_still = self._n_still + 1 if still else 0
        self._n_alike = self._n_alike + 1 if vectors_alike else 0
        self._has_moved |= not still
        if self._n_alike == self._many_alike:
            raise UserError(
                f"step {step}: for {self._n_alike} steps all texts of a batch have had the same vector, so "
                "nothing is learned: lower optimizer.lr, and check the texts and the model"
            )
        if self._n_still == self._many_still:
            self._stands_still(f"step {step}: for {self._n_still} step(s) the gradient has been exactly zero")

    def _stands_still(self, observation: str) -> None:
        if not self._has_moved:
            raise UserError(
                f"{observation}, so nothing is learned: check whether all texts, or all queries, of the data "
                "are equal"
            )
        if rank() == 0:
            log.warning("%s: check whether nothing is left to learn or the run has failed", observation)

    def last_word(self) -> None:
        """Ends the run's check. Warns if no step had a gradient, or if the loss has more than doubled."""
        if not self._has_moved and self._n_steps and rank() == 0:
            log.warning("no step has had a gradient, so nothing was learned: check the data")
        window = min(MANY_STEPS, max(1, self._n_steps // 4))
        if self._n_steps < 2 or rank() != 0:
            return
        before, after = mean(self._first[:window]), mean(islice(reversed(self._last), window))
        if after > 2 * before:
            log.warning(
                "the loss has risen from %.4g to %.4g (means of %s step(s)). This may be chance. If not, "
                "lower optimizer.lr",
                before,
                after,
                window,
            )
