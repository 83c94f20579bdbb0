"""`attn_implementation="llm2vec"` for any caller of transformers: padded, packed, compiled, every backend."""

from __future__ import annotations

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
