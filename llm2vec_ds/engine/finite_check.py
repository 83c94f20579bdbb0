"""Whether losses and gradients are finite, looked at before the step that would spread one that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llm2vec_ds.distributed import all_gather_object, rank
from llm2vec_ds.errors import UserError

TEXTS_NAMED = 3


class NonFiniteError(UserError):
    """A loss, vector or gradient was NaN or infinite; the weights have not moved."""


class FiniteCheck:
    """Stops all ranks before the step that would spread a NaN or an infinity.

    DeepSpeed alone does not: under ZeRO-0 in fp32 a NaN is stepped into the weights, under ZeRO-1 to 3 the
    step is skipped while the step counter moves on. Hooks look at each local gradient before ranks
    exchange it, so that the texts behind it can be named.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._seen: list[tuple[torch.Tensor, list[int]]] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        self._bad = self._bad | ~gradient.detach().isfinite().all()

    def forget(self) -> None:
        """Drops what was noted since the last check."""
        self._bad = torch.zeros_like(self._bad)
        self._seen.clear()

    def end_of_backward(self, loss: torch.Tensor, rows: Sequence[int]) -> None:
        """Notes whether the micro-batch of `rows` had a bad loss or gradient; no wait for the device."""
        self._seen.append((self._bad | ~loss.detach().isfinite(), list(rows)))
        self._bad = torch.zeros_like(self._bad)

    def stop_if_not_finite(self, step: int, bad_rows: list[int], describe: Callable[[int], str]) -> None:
        """Agrees with all ranks; every rank raises the same error.

        Args:
            bad_rows: rows whose own loss or vector is known to be bad; they are named rather than all
                the rows of their micro-batch, or of ranks that only received the bad value.
            describe: row number → a few words of the text.

        Raises:
            NonFiniteError: on any rank something was not finite.
        """
        flags = [bool(flag) for flag, _ in self._seen]
        suspects = [row for flag, (_, rows) in zip(flags, self._seen, strict=True) if flag for row in rows]
        self._seen.clear()
        named = bad_rows or suspects
        words = [f"{row} ({describe(row)})" for row in named[:TEXTS_NAMED]]
        more = f" and {len(named) - TEXTS_NAMED} more" if len(named) > TEXTS_NAMED else ""
        mine = (bool(bad_rows), bool(named), f"rank {rank()}, text {', '.join(words)}{more}")
        everyone = all_gather_object(mine)
        if not any(found for _, found, _ in everyone):
            return
        sure = any(certain for certain, _, _ in everyone)
        places = [place for certain, found, place in everyone if (certain if sure else found)]
        raise NonFiniteError(
            f"step {step}: loss or gradient is not finite ({'; '.join(places)}). The weights have not "
            "moved in this step: lower optimizer.lr, or look at these texts"
        )
