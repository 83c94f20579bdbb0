"""All adapters as one parameter: DeepSpeed, its hooks and its optimizer see one tensor, not hundreds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

ALIGNMENT_BYTES = 16
"""Of each part, for kernels that load so many at a time."""


class Place(NamedTuple):
    """Where a parameter lies in the flat one."""

    start: int
    shape: torch.Size

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start :][: self.shape.numel()].view(self.shape)


class FlatParameter(nn.Module):
    """What DeepSpeed trains in place of a model: one parameter, and a loss that hands over its gradient.

    The model keeps its parameters and their names. They look into the flat one, and their gradients into one
    tensor, which autograd goes on filling. (Slices inside the graph would cost a gradient of full size each.)

    Attributes:
        whole: the flat parameter.
        places: of each parameter, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """
        Args:
            parameters: of one dtype and device.
        """
        super().__init__()
        self._small = parameters
        first = next(iter(parameters.values()))
        step = ALIGNMENT_BYTES // first.element_size()
        self.places: dict[str, Place] = {}
        n_elements = 0
        for name, parameter in parameters.items():
            self.places[name] = Place(n_elements, parameter.shape)
            n_elements += -(-parameter.numel() // step) * step
        self.whole = nn.Parameter(first.new_zeros(n_elements))
        for name, parameter in parameters.items():
            self.places[name].view(self.whole.data).copy_(parameter.data)
        self._linked_to: tuple[int, torch.dtype] | None = None
        self.link()

    def link(self) -> None:
        """Lets the parameters look into the flat one wherever it is now: DeepSpeed casts and moves it."""
        values = self.whole.data
        if self._linked_to == (values.data_ptr(), values.dtype):
            return
        self._linked_to = values.data_ptr(), values.dtype
        self._gradient = torch.zeros_like(values)
        for name, parameter in self._small.items():
            place = self.places[name]
            parameter.grad = None
            parameter.data = place.view(values)
            parameter.grad = place.view(self._gradient)

    def addresses(self) -> tuple[int, int]:
        """Of the weights and of their gradient: where the parameters look into."""
        return self.whole.data_ptr(), self._gradient.data_ptr()

    def find_gradient(self, loss: torch.Tensor) -> None:
        """Backward of `loss`, for the `forward` that follows."""
        self._gradient.zero_()
        loss.backward()

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as one of the flat parameter, with the gradient that was found."""
        handed_over: torch.Tensor = _HandOver.apply(self.whole, loss, self._gradient)
        return handed_over


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * factor, None, None
