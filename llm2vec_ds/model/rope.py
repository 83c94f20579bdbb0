"""RoPE whose factors depend on the length of a text. Each text gets the factors of its own length.

transformers chooses the factors once for each forward pass, by the longest text in it. For `dynamic` it even
takes the longest text so far. Here the neighbours of a text do not count.

`longrope` (arXiv 2402.13753) has one set of factors up to the length of the pretraining, and one beyond it.
`dynamic` stretches its base further with every token beyond that length.

Shape legend: B rows, L tokens of a row.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

BY_LENGTH = {"longrope", "dynamic"}
"""Types of RoPE whose factors depend on the length of a text."""
Angles = Any
"""The result of a rotary embedding: one tensor `[B, L, …]`, or cosines and sines."""


def length_of_change(config: Any, parameters: dict[str, Any] | None = None) -> int | None:
    """Returns the length in tokens beyond which RoPE's factors change. None: they never do.

    Args:
        config: the trunk's.
        parameters: RoPE's parameters of one type of layer. None: those of all types. Then the smallest length
            counts.
    """
    if parameters is None:
        parameters = getattr(config, "rope_parameters", None) or {}
        by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
        lengths = [length_of_change(config, one) for one in by_layer_type or [parameters]]
        return min((length for length in lengths if length is not None), default=None)
    if parameters.get("rope_type", "default") not in BY_LENGTH:
        return None
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)


def choose_rope_by_text(trunk: nn.Module) -> None:
    """Puts `RopeByText` around each rotary embedding of the trunk whose factors depend on lengths."""
    chosen = {id(part.rope) for part in trunk.modules() if isinstance(part, RopeByText)}
    found = [
        (name, part)
        for name, part in trunk.named_modules()
        if _kinds(part) & BY_LENGTH and id(part) not in chosen
    ]
    for name, rope in found:
        parent, _, child = name.rpartition(".")
        setattr(trunk.get_submodule(parent), child, RopeByText(rope))
        log.info("%s: RoPE factors are chosen for each text by its own length", name)


def _kinds(part: nn.Module) -> set[str]:
    kind = getattr(part, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()


class RopeByText(nn.Module):
    """Calls a rotary embedding of transformers once for each set of factors, with all texts that use it."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Angles:
        """Returns the angles for `position_ids` `[B, L]`.

        A new text starts wherever a position is not one more than the position before.
        """
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rope.rope_type if layer_type is None else self.rope.rope_type[layer_type]
        if kind == "longrope":
            return self._longrope(x, position_ids, of_layer)
        if kind == "dynamic":
            return self._dynamic(x, position_ids, of_layer)
        return self.rope(x, position_ids, **of_layer)

    def _longrope(self, x: torch.Tensor, position_ids: torch.Tensor, of_layer: dict[str, str]) -> Angles:
        """Computes both sets of angles for all tokens and chooses for each token.

        So no value is read from the device here. transformers takes the long factors if a position reaches
        the limit. To get them, one such position is added, and its angles are cut off again.
        """
        parameters = self.rope.config.rope_parameters
        parameters = parameters[of_layer["layer_type"]] if of_layer else parameters
        limit = parameters["original_max_position_embeddings"]
        is_long = text_lengths(position_ids) > limit
        short = self.rope(x, position_ids.masked_fill(is_long, 0), **of_layer)
        beyond = position_ids.new_full((len(position_ids), 1), limit)
        long = self.rope(x, torch.cat([position_ids, beyond], 1), **of_layer)
        return _chosen(is_long, _each(long, lambda angles: angles[:, :-1]), short)

    def _dynamic(self, x: torch.Tensor, position_ids: torch.Tensor, of_layer: dict[str, str]) -> Angles:
        lengths = text_lengths(position_ids)
        is_long = lengths > self.rope.original_max_seq_len
        angles = self._anew(x, position_ids.masked_fill(is_long, 0), of_layer)
        for length in lengths[is_long].unique().tolist():
            chosen = lengths == length
            found = self._anew(x, position_ids.masked_fill(~chosen, 0), of_layer)
            angles = _chosen(chosen, found, angles)
        return angles

    def _anew(self, x: torch.Tensor, position_ids: torch.Tensor, of_layer: dict[str, str]) -> Angles:
        """Calls the embedding as if it were new.

        The embedding keeps the stretch of the longest text so far. A text of one token resets it.
        """
        self.rope(x, position_ids.new_zeros(1, 1), **of_layer)
        return self.rope(x, position_ids, **of_layer)


def text_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns for each token the length of its text, `[B, L]`."""
    n_rows, n_tokens = position_ids.shape
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
    starts[:, :1] = True
    text = (starts.flatten().cumsum(0) - 1).to(torch.int64)
    positions = position_ids.flatten()
    longest = positions.new_zeros(n_rows * n_tokens).scatter_reduce(0, text, positions + 1, "amax")
    return longest[text].view(n_rows, n_tokens)


def _each(angles: Angles, change: Any) -> Angles:
    return tuple(map(change, angles)) if isinstance(angles, tuple) else change(angles)


def _chosen(where: torch.Tensor, angles: Angles, others: Angles) -> Angles:
    """Takes `angles` where `where` is true, else `others`. A row of `[1, L, …]` stands for all rows."""

    def of(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.where(where.view(*where.shape, *[1] * (pair[0].dim() - 2)), *pair)

    if isinstance(angles, tuple):
        return tuple(of(pair) for pair in zip(angles, others, strict=True))
    return of((angles, others))
