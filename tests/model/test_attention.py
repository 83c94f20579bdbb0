"""`attn_implementation="llm2vec"` for any caller of transformers: padded, packed, compiled, every backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llm2vec_kernels.attention import AttentionOptions, attention

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.attention import _padding_last, register
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from tests.support.tiny import tiny_llama

ROWS, LENGTH = 3, 9


def trunk(implementation: str, causal: bool = False) -> torch.nn.Module:
    model = tiny_llama().model
    model.config.is_causal = causal
    model.set_attn_implementation(implementation)
    return model.eval()


def padded_batch(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 400, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def masks() -> dict[str, torch.Tensor]:
    position = torch.arange(LENGTH)[None]
    lengths = torch.tensor([9, 4, 1])[:, None]
    holes = (position % 3 != 1).long().expand(ROWS, -1).clone()
    return {
        "right": (position < lengths).long(),
        "left": (position >= LENGTH - lengths).long(),
        "holes": holes,
    }


@pytest.mark.parametrize("implementation", ["llm2vec", "llm2vec_triton"])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_a_padding_mask_is_unpadded(implementation: str, side: str) -> None:
    """Hidden states and gradients of eager transformers."""
    if implementation == "llm2vec_triton":
        pytest.importorskip("triton")
    register()
    register("triton")
    mask = masks()[side]
    results = []
    for name in ("eager", implementation):
        model = trunk(name)
        hidden = model(**padded_batch(mask), use_cache=False).last_hidden_state[mask.bool()]
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((hidden * weight).sum(), list(model.parameters()))
        results.append([hidden.detach(), *gradients])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_order_of_a_padded_batch() -> None:
    order, cu_seqlens = _padding_last(torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]))
    assert order.tolist() == [0, 1, 4, 5, 6, 7, 8, 2, 3]
    assert cu_seqlens.tolist() == [0, 2, 4, 7, 8, 9, 9]


@pytest.mark.parametrize("padded", [False, True])
def test_compiles(padded: bool) -> None:
    torch._dynamo.reset()
    register("triton")
    pytest.importorskip("triton")
    model = trunk("llm2vec_triton")
    batch = padded_batch(masks()["right"])
    if not padded:
        cu_seqlens = torch.tensor([0, 9, 13, 27]).int()
        batch = {
            "input_ids": batch["input_ids"].reshape(1, -1),
            "position_ids": batch["position_ids"].reshape(1, -1),
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": 14,
            "max_length_k": 14,
        }
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        plain = model(**batch, use_cache=False).last_hidden_state
        ours = compiled(**batch, use_cache=False).last_hidden_state
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(ours[real], plain[real], rtol=1e-5, atol=1e-5)


def test_causal_goes_to_torch_or_is_refused() -> None:
    register()
    register("triton")
    batch = padded_batch(masks()["right"])
    real = batch["attention_mask"].bool()
    eager, auto = (trunk(name, causal=True)(**batch, use_cache=False)[0] for name in ("eager", "llm2vec"))
    torch.testing.assert_close(auto[real], eager[real], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'triton'.*causal attention is not supported"):
        trunk("llm2vec_triton", causal=True)(**batch, use_cache=False)


def test_what_is_no_padding_mask_is_refused() -> None:
    register()
    model = trunk("llm2vec")
    ids = padded_batch(masks()["right"])["input_ids"]
    with pytest.raises(ValueError, match="not one of 4 dimensions"):
        model(input_ids=ids, attention_mask=torch.zeros(ROWS, 1, LENGTH, LENGTH), use_cache=False)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no key/value cache: pass use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_loading_refuses_before_it_reads_weights(tiny_model_dir: object) -> None:
    for options, message in (
        (TrunkOptions(attention="varlen"), "'varlen'.*needs a CUDA device|only float16"),
        (TrunkOptions(attention="triton", causal=True), "'triton': causal attention is not supported"),
        (TrunkOptions(attention="flashy"), "unknown attention backend 'flashy'"),
    ):
        with pytest.raises(UserError, match=message):
            load_trunk(str(tiny_model_dir), options)


def test_max_seqlen_may_be_left_out() -> None:
    q, k, v = torch.randn(3, 7, 2, 8, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 3, 7]).int()
    options = AttentionOptions(0.5)
    assert torch.equal(
        attention(q, k, v, cu_seqlens, options=options), attention(q, k, v, cu_seqlens, 4, options=options)
    )


def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Ours, of tensors `[B, H, L, D]`."""
    from transformers import AttentionInterface

    run = AttentionInterface()[register()]
    return run(module, q, k, v, options.pop("mask", None), is_causal=False, scaling=0.3, **options)[0]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Written out, `[B, H, L, D]` → `[B, L, H, D]`."""
    score = (0.3 * q @ k.mT).masked_fill(~visible, float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2)


def chunked_layer() -> Any:
    config = SimpleNamespace(layer_types=["full_attention", "chunked_attention"], attention_chunk_size=4)
    return SimpleNamespace(config=config, layer_idx=1)


@pytest.mark.parametrize("packed", [True, False])
def test_chunked_attention_ends_with_chunk_and_text(packed: bool) -> None:
    """Chunks of 4 from each text's start, packed, and padded on the left."""
    lengths = [3, 10, 4, 1, 6] if packed else [9, 5, 1]
    shape = (1, 2, sum(lengths), 8) if packed else (3, 2, max(lengths), 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    if packed:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        chunk = torch.cat([100 * i + torch.arange(n) // 4 for i, n in enumerate(lengths)])[None]
        found = attend(chunked_layer(), q, k, v, cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths))
        real = chunk >= 0
    else:
        real = torch.arange(9)[None] >= 9 - torch.tensor(lengths)[:, None]
        chunk = torch.where(real, (real.cumsum(1) - 1) // 4, -1)
        found = attend(chunked_layer(), q, k, v, mask=real.long())
    visible = (chunk[:, :, None] == chunk[:, None, :])[:, None]
    torch.testing.assert_close(found[real], dense(q, k, v, visible)[real])
    assert (found - attend(SimpleNamespace(), q, k, v)).abs().max() > 0.1


@pytest.mark.parametrize(("width", "value_width"), [(12, 8), (8, 12)])
def test_values_may_have_another_width(width: int, value_width: int) -> None:
    """Outputs and gradients of dense attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 7, w, generator=generator, dtype=torch.float64, requires_grad=True)
        for w in (width, width, value_width)
    )
    everything = torch.ones(7, 7, dtype=torch.bool)
    outputs = [attend(SimpleNamespace(), q, k, v), dense(q, k, v, everything)]
    assert outputs[0].shape == (1, 7, 2, value_width)
    weight = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    results = [[out, *torch.autograd.grad((out * weight).sum(), (q, k, v))] for out in outputs]
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads"):
        attend(SimpleNamespace(), q, k, k)
