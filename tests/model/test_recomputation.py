"""Selective activation checkpointing: what is computed twice, what is kept, what is refused."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from llm2vec_kernels import products
from llm2vec_kernels.products import cpu_products
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.cpu_linear import use_fast_products
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.model.origins import how_to_keep, note_origin
from llm2vec_ds.model.recomputation import Recomputation, _keep_and_replay, recompute_activations
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.small_texts import texts
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_trunk import trunk


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def calls(which: Recomputation) -> Counter[Any]:
    """Of a training pass of a tiny Llama with adapters."""
    model = trunk()
    add_lora(model, AdapterConfig(rank=2, dropout=0.0, zero_init=False))
    recompute_activations(model, which)
    encoder = Encoder(model.train(), tiny_tokenizer())
    with Counting() as counting:
        encoder(pack(texts())).square().sum().backward()
    return counting.calls


def test_products_run_once_and_the_rest_twice() -> None:
    none, selective, full = calls("none"), calls("selective"), calls("full")
    product = torch.ops.llm2vec_ds.lora_linear.default
    attention = torch.ops.llm2vec.cpu_attention.default
    assert selective[product] == none[product] < full[product]
    assert selective[attention] == none[attention] < full[attention]
    assert selective[torch.ops.aten.silu.default] == 2 * none[torch.ops.aten.silu.default]


def adapted(dropout: float = 0.3) -> Encoder:
    """A tiny Llama whose norms and gated units are known, with adapters that change something."""
    model = trunk()
    fuse_layers(model)
    torch.manual_seed(1)
    add_lora(model, AdapterConfig(rank=2, dropout=dropout, zero_init=False))
    return Encoder(model.train(), tiny_tokenizer())


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    encoder(pack(texts())).square().sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def test_known_layers_are_made_again_without_dispatch_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(adapted())
    encoder = adapted()
    said = recompute_activations(encoder.trunk, "selective")
    assert said == "selective: backward recomputes 2 SwiGLU, 5 RMSNorm"
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", None)
    found = gradients(encoder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tensor_is_made_once_and_then_let_go() -> None:
    n_made = 0

    def make(x: torch.Tensor) -> torch.Tensor:
        nonlocal n_made
        n_made += 1
        return x + 1

    x = torch.ones(3)
    out = note_origin(x + 1, make, x)
    readers = [how_to_keep(out) for _ in range(3)]
    made = [again(*kept) for again, kept in readers]
    assert all(torch.equal(value, out) for value in made)
    assert n_made == 1
    left = weakref.ref(made[0])
    del made
    assert left() is None


def kept_bytes(which: Recomputation) -> int:
    """Of tensors that the trunk holds for backward, weights left out."""
    encoder = adapted()
    recompute_activations(encoder.trunk, which)
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder.hidden_states(pack(texts()))
    return sum(kept.values())


def test_what_is_made_again_is_not_kept() -> None:
    """Two norms of width 32 and a gated unit of 48 in each of two layers."""
    n_tokens = pack(texts()).n_tokens
    saved = kept_bytes("none") - kept_bytes("selective")
    assert saved == 2 * n_tokens * 4 * (2 * 32 + 48)


@pytest.mark.parametrize("which", ["selective", "full"])
def test_a_second_run_draws_the_same_dropout(which: Recomputation) -> None:
    """`full`, and `selective` of layers that are not known, against a run that keeps all and draws as they
    do, again for each layer."""
    results = []
    for kept in (True, False):
        model = trunk()
        torch.manual_seed(1)
        add_lora(model, AdapterConfig(rank=2, dropout=0.3, zero_init=False))
        encoder = Encoder(model.train(), tiny_tokenizer())
        if kept:
            dropouts = next(m.dropouts for m in model.modules() if isinstance(m, LoraLinear))
            for layer in model.layers:
                layer.register_forward_pre_hook(dropouts.forget)
        else:
            assert recompute_activations(model, which).startswith(which)
        results.append(gradients(encoder))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)


def test_a_layer_without_adapter_keeps_onednns_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward's two; `full` computes forward's again."""
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
    monkeypatch.setattr(products, "LEAST_FOR_ONEDNN", 1)
    cpu_products.cache_clear()
    try:
        counted = {}
        for which in ("none", "selective", "full"):
            model = trunk()
            use_fast_products(model, torch.device("cpu"))
            recompute_activations(model, which)
            encoder = Encoder(model.train(), tiny_tokenizer())
            with Counting() as counting:
                encoder(pack(texts())).square().sum().backward()
            counted[which] = counting.calls[torch.ops.mkldnn._linear_pointwise.default]
    finally:
        cpu_products.cache_clear()
    assert 0 < counted["selective"] == counted["none"] < counted["full"]


def test_a_kept_result_that_changes_in_place_is_refused() -> None:
    weight = torch.randn(300, 4, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        product = x @ weight
        out = product.exp()
        with torch.no_grad():
            product.zero_()
        return out.exp()

    out = checkpoint(
        layer,
        torch.randn(3, 300, requires_grad=True),
        use_reentrant=False,
        context_fn=_keep_and_replay,
    )
    with pytest.raises(RuntimeError, match="activation_checkpointing none or full"):
        out.sum().backward()
