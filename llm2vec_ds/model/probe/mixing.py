"""Finds which inputs of a part of a trunk change which of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MOVED = 1e-12
"""An output has moved if it changes by more than this times the largest output.

An output that an input does not reach stays the same to the bit. One that it reaches may change very little:
a softmax may give a weight of a billionth.
"""


@dataclass(frozen=True)
class Call:
    """A recorded call of a part of the trunk. It can be made again with another input."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    def inputs(self) -> Iterator[tuple[int | str, Any]]:
        """Yields each input with its position or name. An input called `hidden_states` comes first."""
        yield from ((k, v) for k, v in self.kwargs.items() if k == "hidden_states")
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def output_with(self, key: int | str, value: torch.Tensor) -> torch.Tensor | None:
        """Calls the part with one input replaced. Returns the first tensor of its output, or None."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value
        output = self.module(*args, **kwargs)
        while isinstance(output, tuple | list) and output:
            output = output[0]
        return output if torch.is_tensor(output) else None


def calls_of(trunk: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Records the calls of all parts of the trunk while `run` runs it. The innermost parts come first."""
    calls: list[Call] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(name, module, args, kwargs))

        return hook

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in trunk.named_modules()
        if module is not trunk and not isinstance(module, nn.Linear | nn.Embedding)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda call: -call.name.count("."))


def moved_outputs(call: Call, length: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns which outputs the middle token's input moves, and which the last token's input moves.

    Each is `[length]` bool. None: the part does not map tokens to tokens, or no token moves another by more
    than `tolerance` times the largest output. (Experts take tokens in groups, so rounding moves all outputs a
    little.)
    """
    found = next((pair for pair in call.inputs() if _of_tokens(pair[1], length)), None)
    if found is None:
        return None
    key, value = found
    plain = call.output_with(key, value)
    if plain is None or length not in plain.shape or not plain.numel():
        return None
    axis, out_axis = list(value.shape).index(length), list(plain.shape).index(length)
    moved, clearly = [], 0
    for position in (length // 2, length - 1):
        changed = value.clone()
        changed.select(axis, position).add_(_step(value.select(axis, position)))
        output = call.output_with(key, changed)
        if output is None or output.shape != plain.shape:
            return None
        distance = (output - plain).abs().transpose(0, out_axis).flatten(1).amax(1)
        moved.append(distance > MOVED * plain.abs().max())
        distance[position] = 0
        clearly += int((distance > tolerance * plain.abs().max()).sum())
    return (moved[0], moved[1]) if clearly else None


def _of_tokens(value: Any, length: int) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and length in value.shape


def _step(part: torch.Tensor) -> torch.Tensor:
    """Returns a change as large as the input. It differs in each place: a norm undoes an equal change."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
    return noise * part.std().clamp(min=1e-3)
