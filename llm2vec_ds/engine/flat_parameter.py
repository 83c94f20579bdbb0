"""All adapters as one parameter. DeepSpeed, its hooks and its optimizer see one tensor, not hundreds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

ALIGNMENT_BYTES = 16
"""Each part starts at a multiple of this. Kernels load 16 bytes at a time."""


class Place(NamedTuple):
    """Where a parameter lies in the flat one: its first element and its shape."""

    start: int
    shape: torch.Size

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns this part of `flat`, in the parameter's shape."""
        return flat[self.start :][: self.shape.numel()].view(self.shape)


class FlatParameter(nn.Module):
    """The module that DeepSpeed trains in place of the model. It has one parameter.

    The model keeps its parameters and their names. Each is a view of the flat parameter. Their gradients are
    views of one flat gradient. An ordinary backward pass fills it, and `forward` hands it to DeepSpeed.

    Why views: if the parameters were slices of the flat one inside the autograd graph, the backward of each
    slice would make a gradient of full size.

    Attributes:
        whole: the flat parameter.
        places: maps each parameter's name to its place in `whole`.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """
        Args:
            parameters: name → parameter. All have one dtype and one device.
        """
        super().__init__()
        self._small = parameters
        first = next(iter(parameters.values()))
        step = ALIGNMENT_BYTES // first.element_size()
        self.places: dict[str, Place] = {}
        n_elements = 0
        for name, parameter in parameters.items():
            self.places[name] = Place(n_elements, parameter.shape)
            n_elements += -(-parameter.numel() // step) * step  # rounded up: the next part starts aligned
        self.whole = nn.Parameter(first.new_zeros(n_elements))
        for name, parameter in parameters.items():
            self.places[name].view(self.whole.data).copy_(parameter.data)
        self._linked_to: tuple[int, torch.dtype] | None = None
        self.link()

    def link(self) -> None:
        """Makes the parameters views of the flat one again, if it has moved.

        DeepSpeed casts the flat parameter and moves it to other memory. The old views would then still show
        the old memory.
        """
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
        """Returns the addresses of the flat parameter and of its gradient."""
        return self.whole.data_ptr(), self._gradient.data_ptr()

    def find_gradient(self, loss: torch.Tensor) -> None:
        """Runs the backward pass of `loss`. The `forward` that follows hands its gradient over."""
        # Autograd adds to a `.grad` that exists, so the views stay and fill `_gradient`.
        self._gradient.zero_()
        loss.backward()

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss. Its backward gives the flat parameter the gradient of `find_gradient`."""
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
