"""Checks that losses and gradients are finite, before the optimizer step that would spread a NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from llm2vec_ds.distributed import all_gather_object, on_any_rank, rank
from llm2vec_ds.errors import UserError

TEXTS_NAMED = 3
ELEMENTS_HELD = 2**22
"""Gradients are checked together once they hold this many numbers. Those that wait stay in memory."""


class NonFiniteError(UserError):
    """A loss, vector or gradient was NaN or infinite. The weights have not moved."""


class FiniteCheck:
    """Stops all ranks before the optimizer step if a loss or gradient is NaN or infinite.

    DeepSpeed alone does not stop. Under ZeRO-0 in fp32 it writes the NaN into the weights. Under ZeRO-1 to 3
    it skips the step, but its step counter still moves on.

    A hook sees each local gradient before ranks exchange it. So the error can name the texts behind it.

    One operation checks many gradients. An adapter has many small gradients, so the number of operations sets
    the cost.
    """

    def __init__(self, trainable: Iterable[nn.Parameter]) -> None:
        self._gradients: list[torch.Tensor] = []
        self._n_elements = 0
        self._norms: list[torch.Tensor] = []
        self._seen: list[tuple[torch.Tensor, list[int]]] = []
        for parameter in trainable:
            parameter.register_hook(self._take)

    def _take(self, gradient: torch.Tensor) -> None:
        self._gradients.append(gradient.detach())
        self._n_elements += gradient.numel()
        if self._n_elements >= ELEMENTS_HELD:
            self._look()

    def _look(self) -> None:
        """Notes the largest absolute value of each gradient. It is finite only if all values are."""
        if self._gradients:
            self._norms += torch._foreach_norm(self._gradients, float("inf"))
        self._gradients, self._n_elements = [], 0

    def forget(self) -> None:
        """Drops everything noted since the last check."""
        self._gradients, self._n_elements, self._norms = [], 0, []
        self._seen.clear()

    def end_of_backward(self, loss: torch.Tensor, rows: Sequence[int]) -> None:
        """Notes whether the micro-batch of `rows` had a bad loss or gradient. Never waits for the device."""
        self._look()
        values = [loss.detach().float(), *(norm.float() for norm in self._norms)]
        self._seen.append((~torch.stack(values).isfinite().all(), list(rows)))
        self._norms = []

    def stop_if_not_finite(
        self, step: int, find_bad_rows: Callable[[], list[int]], describe: Callable[[int], str]
    ) -> None:
        """Raises the same error on every rank if anything on any rank was not finite.

        Args:
            find_bad_rows: returns the rows whose own loss or vector is bad. The error names them if there
                are any. Otherwise it names all rows of a bad micro-batch.
            describe: maps a row number to a few words of the text.

        Raises:
            NonFiniteError: something was not finite on at least one rank.
        """
        seen, self._seen = self._seen, []
        flag_M = torch.stack([flag for flag, _ in seen])
        if not on_any_rank(flag_M.any()):
            return
        flags, bad_rows = flag_M.tolist(), find_bad_rows()
        suspects = [row for flag, (_, rows) in zip(flags, seen, strict=True) if flag for row in rows]
        named = bad_rows or suspects
        words = [f"{row} ({describe(row)})" for row in named[:TEXTS_NAMED]]
        more = f" and {len(named) - TEXTS_NAMED} more" if len(named) > TEXTS_NAMED else ""
        mine = (bool(bad_rows), bool(named), f"rank {rank()}, text {', '.join(words)}{more}")
        everyone = all_gather_object(mine)
        # A bad text spoils the loss of ranks that only received its vector. If any rank knows its bad rows,
        # the others' suspects are left out.
        sure = any(certain for certain, _, _ in everyone)
        places = [place for certain, found, place in everyone if (certain if sure else found)]
        raise NonFiniteError(
            f"step {step}: loss or gradient is not finite ({'; '.join(places)}). The weights have not "
            "moved in this step: lower optimizer.lr, or look at these texts"
        )
