"""Selective activation checkpointing: what is computed twice, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from llm2vec_kernels.products import cpu_products
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llm2vec_ds.data.packing import pack
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.cpu_linear import use_fast_products
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


def test_a_layer_without_adapter_keeps_onednns_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward's two; `full` computes forward's again."""
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
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
