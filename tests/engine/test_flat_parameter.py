"""Many parameters as one: values, gradients and names stay, wherever DeepSpeed moves the one."""

from __future__ import annotations

import torch
from torch import nn

from llm2vec_ds.engine.flat_parameter import ALIGNMENT_BYTES, FlatParameter


def model_and_flat() -> tuple[nn.Module, FlatParameter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, FlatParameter(dict(model.named_parameters()))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 12).view(4, 3).to(next(model.parameters()).dtype)).square().sum()


def test_parameters_look_into_the_flat_one() -> None:
    torch.manual_seed(0)
    expected = [
        p.detach().clone() for p in nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).parameters()
    ]
    model, flat = model_and_flat()
    for (name, parameter), value in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(flat.places[name].view(flat.whole), value)
        assert parameter.data_ptr() % ALIGNMENT_BYTES == 0
    with torch.no_grad():
        flat.whole.zero_()
    assert not any(p.any() for p in model.parameters())


def test_the_flat_gradient_is_the_parameters() -> None:
    model, flat = model_and_flat()
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    for factor in (1.0, 3.0):  # the second pass does not add to the first one's
        flat.whole.grad = None
        loss = loss_of(model)
        flat.find_gradient(loss)
        handed_over = flat(loss.detach())
        assert torch.equal(handed_over, loss)
        (handed_over * factor).backward()
        assert flat.whole.grad is not None
        for place, gradient in zip(flat.places.values(), expected, strict=True):
            torch.testing.assert_close(place.view(flat.whole.grad), gradient * factor)
    n_real = sum(p.numel() for p in model.parameters())
    assert (flat.whole.grad != 0).sum() <= n_real < flat.whole.numel()


def test_links_follow_a_cast_and_a_move() -> None:
    model, flat = model_and_flat()
    before = [p.detach().clone() for p in model.parameters()]
    flat.bfloat16()
    flat.link()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value.bfloat16())
    flat.whole.data = flat.whole.data.clone()
    flat.link()
    with torch.no_grad():
        flat.whole.fill_(2)
    assert all((p == 2).all() for p in model.parameters())
    flat.find_gradient(loss_of(model))
    flat(torch.zeros((), dtype=torch.bfloat16)).backward()
    assert flat.whole.grad is not None
    assert flat.whole.grad.dtype == torch.bfloat16
    assert flat.whole.grad.any()
