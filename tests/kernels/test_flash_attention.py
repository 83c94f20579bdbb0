"""The Triton kernels against the reference in double precision, gradients too.

On a machine with a GPU they run there, else in Triton's interpreter. A kernel may lose at most twice what
the reference itself loses when it computes in the kernel's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm2vec_kernels.attention import AttentionOptions, reference

pytest.importorskip("triton")
from llm2vec_kernels.attention.tile_sizes import tiles_on
from llm2vec_kernels.attention.triton import flash_attention, flash_attention_op, visible_intervals

from tests.support.interpreter import round_bf16_to_nearest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TILE = tiles_on(DEVICE, BF16, 64, 512).forward.rows
RAGGED = (5, 0, 1, TILE - 1, TILE, TILE + 1, 0)
SEED = 20_000_000_021  # beyond 32 bits


@pytest.fixture(autouse=True)
def _exact_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if DEVICE.type == "cpu":
            round_bf16_to_nearest(monkeypatch)
        yield


def cumulative(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def inputs(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v and the weights of the scalar that gradients are taken of."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    seed: int | None = None,
    **options: Any,
) -> torch.Tensor:
    scaled = AttentionOptions(q.shape[-1] ** -0.5, **options)
    given = None if seed is None else torch.tensor(seed, device=DEVICE)
    return flash_attention(q, k, v, cumulative(lengths), max(lengths, default=0), scaled, seed=given)


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    kept_HTT: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    scaled = AttentionOptions(q.shape[-1] ** -0.5, **options)
    return reference.attention(q, k, v, cumulative(lengths), scaled, kept_HTT)


def with_gradients(
    function: Any, tensors: list[torch.Tensor], lengths: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> dict[str, torch.Tensor]:
    q, k, v, weight = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = function(*leaves, lengths, **options)
    (out * weight).sum().backward()
    return {"out": out.detach(), **{n: x.grad for n, x in zip(("dq", "dk", "dv"), leaves, strict=True)}}


def assert_close_to_reference(
    tensors: list[torch.Tensor],
    lengths: tuple[int, ...],
    kernel_options: dict[str, Any],
    reference_options: dict[str, Any] | None = None,
) -> None:
    dtype = tensors[0].dtype
    reference_options = kernel_options if reference_options is None else reference_options
    ours = with_gradients(kernel, tensors, lengths, dtype, **kernel_options)
    naive = with_gradients(expected, tensors, lengths, dtype, **reference_options)
    exact = with_gradients(expected, tensors, lengths, FP64, **reference_options)
    alone = kernel_options.get("window") == 0 or max(lengths) == 1
    for name, truth in exact.items():
        error, naive_error = ((x[name].double() - truth).abs().max() for x in (ours, naive))
        assert ours[name].dtype == dtype
        if alone and name in ("dq", "dk"):  # each token sees itself only, with a weight of 1
            assert truth.abs().max() < 1e-12
        else:
            assert truth.abs().max() > 0.1
        assert error <= 2 * naive_error + 1e-6, f"{name}: {error:.2e}, naive {naive_error:.2e}"


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "options"),
    [
        (FP32, (2, 2), 64, {}),
        (FP32, (3, 1), 32, {"softcap": 2.0, "window": 7}),
        (FP16, (3, 1), 64, {}),
        (BF16, (2, 1), 128, {}),
        (BF16, (8, 1), 32, {"window": 0}),
        (FP16, (2, 1), 80, {"window": TILE + 3}),
        (BF16, (1, 1), 96, {"softcap": 2.0}),
        (BF16, (1, 1), 256, {"window": 20, "softcap": 30.0}),
    ],
)
def test_error_is_at_most_twice_that_of_plain_pytorch(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, options: dict[str, Any]
) -> None:
    assert_close_to_reference(inputs(RAGGED, *heads, head_dim, dtype), RAGGED, options)


def test_tiles_that_every_row_sees_whole() -> None:
    """A text of several tiles, not starting at a tile's border: its inner tiles skip the mask."""
    lengths = (3, 4 * TILE + 5)
    assert_close_to_reference(inputs(lengths, 1, 1, 32, FP32), lengths, {})


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 21), min_size=1, max_size=6).filter(lambda x: sum(x) > 4).map(tuple),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([8, 16, 24]),
    window=st.sampled_from([None, 1, 4]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_any_shape(
    lengths: tuple[int, ...], kv_heads: int, head_dim: int, window: int | None, softcap: float | None
) -> None:
    tensors = inputs(lengths, 2, kv_heads, head_dim, FP32)
    assert_close_to_reference(tensors, lengths, {"window": window, "softcap": softcap})


def kept_by_dropout(
    q: torch.Tensor, k: torch.Tensor, lengths: tuple[int, ...], **options: Any
) -> torch.Tensor:
    """`[Hq, T, T]` bool: with the unit vectors as values, outputs are the weights themselves."""
    tokens, _, head_dim = k.shape
    parts = []
    for first in range(0, tokens, head_dim):
        v = torch.zeros_like(k)
        picked = torch.arange(first, min(first + head_dim, tokens), device=DEVICE)
        v[picked, :, picked - first] = 1.0
        parts.append(kernel(q, k, v, lengths, **options)[..., : len(picked)])
    return torch.cat(parts, dim=-1).transpose(0, 1) != 0


@pytest.mark.parametrize(("dtype", "softcap"), [(FP32, None), (BF16, 2.0)])
def test_backward_draws_the_dropout_mask_of_forward(dtype: torch.dtype, softcap: float | None) -> None:
    lengths = (7, TILE + 9, 1, 11)
    tensors = inputs(lengths, 2, 1, 64, dtype)
    options = {"dropout_p": 0.3, "softcap": softcap}
    kept = kept_by_dropout(*tensors[:2], lengths, seed=SEED, **options)
    reference_options = {**options, "kept_HTT": kept}
    assert_close_to_reference(tensors, lengths, {**options, "seed": SEED}, reference_options)


def test_dropout_keeps_the_asked_share_and_the_mean_and_is_independent() -> None:
    lengths = (96,)
    q, k, v, _ = inputs(lengths, 4, 4, 32, FP32)
    q, k, v = torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v)
    kept = kept_by_dropout(q, k, lengths, dropout_p=0.3, seed=SEED).double()
    # 36,864 draws: the standard error of a share is 0.0024.
    assert abs(kept.mean() - 0.7) < 0.01
    out = kernel(q, k, v, lengths, dropout_p=0.3, seed=SEED)
    assert abs(out.mean() - 1.0) < 0.015
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.transpose(1, 2)):
        agreement = (kept == other).double().mean()
        assert abs(agreement - (0.7**2 + 0.3**2)) < 0.02


def test_the_seed_fixes_dropout_and_torchs_generator_draws_it() -> None:
    lengths = (20,)
    q, k, v, _ = inputs(lengths, 1, 1, 16, FP32)
    a, b, c = (kernel(q, k, v, lengths, dropout_p=0.5, seed=seed) for seed in (1, 1, 1 + 2**40))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn += [kernel(q, k, v, lengths, dropout_p=0.5) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[4])


def test_layers_share_their_intervals_also_without_gradients() -> None:
    cu_seqlens = cumulative((3, 2))
    with torch.inference_mode():
        kept = visible_intervals(cu_seqlens, 5, None)
        assert visible_intervals(cu_seqlens, 5, None)[0] is kept[0]
    assert not visible_intervals(cu_seqlens, 5, None)[0].is_inference()


def test_activation_checkpointing_replays_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    lengths = (20,)
    tensors = inputs(lengths, 1, 1, 16, FP32)
    gradients = []
    for function in (
        kernel,
        lambda *args, **options: checkpoint(kernel, *args, use_reentrant=False, **options),
    ):
        torch.manual_seed(3)
        gradients.append(with_gradients(function, tensors, lengths, FP32, dropout_p=0.5))
    for name, ours in gradients[0].items():
        assert torch.equal(ours, gradients[1][name]), name


def test_no_text_sees_another_to_the_last_bit() -> None:
    lengths = (7, TILE + 2, 0, 9, 30)
    tensors = inputs(lengths, 2, 1, 32, BF16)
    before = with_gradients(kernel, tensors, lengths, BF16)
    bounds = cumulative(lengths).tolist()
    changed = slice(bounds[3], bounds[4])
    for x in tensors:
        x[changed] = x[changed] * 3 + 1
    after = with_gradients(kernel, tensors, lengths, BF16)
    for name in before:
        same = (before[name] == after[name]).flatten(1).all(1)
        assert same[: changed.start].all(), name
        assert same[changed.stop :].all(), name
        assert not same[changed].any(), name


def test_backward_gives_the_same_bits_twice() -> None:
    tensors = inputs(RAGGED, 3, 1, 32, BF16)
    first, second = (with_gradients(kernel, tensors, RAGGED, BF16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers are full of NaN, also those that gradients come in."""
    tensors = inputs(RAGGED, 2, 1, 24, FP32)
    poisoned: list[torch.Tensor] = []

    def poison(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                poisoned.append(tensor.fill_(float("nan")))
            return tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    results = with_gradients(kernel, tensors, RAGGED, FP32)
    assert len(poisoned) >= 6  # out, lse, delta, dq, dk, dv
    assert all(x.isfinite().all() for x in results.values())


def test_strided_inputs_and_an_expanded_gradient() -> None:
    """q, k, v as slices of one projection; the gradient of a plain sum has stride 0."""
    lengths = (9, 25)
    fused = inputs(lengths, 4, 1, 32, FP32)[0]
    strided = [fused[:, :2], fused[:, 2:3], fused[:, 3:]]
    results = []
    for layout in (strided, [x.contiguous() for x in strided]):
        leaves = [x.detach().requires_grad_() for x in layout]
        kernel(*leaves, lengths).sum().backward()
        results.append([x.grad for x in leaves])
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    turned = inputs(lengths, 2, 2, 32, FP32)[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride(-1) != 1
    assert torch.equal(kernel(turned, turned, turned, lengths), kernel(*[turned.contiguous()] * 3, lengths))


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that the last lies past 2^31 elements; untouched memory in between costs nothing."""
    lengths = (10,) * 30
    tokens, stride = sum(lengths), 2**23
    tensors = inputs(lengths, 1, 1, 16, FP16)
    far = torch.empty(tokens * stride, dtype=FP16, device=DEVICE).as_strided((tokens, 1, 16), (stride, 16, 1))
    assert far.stride(0) * (tokens - 1) > 2**31
    far.copy_(tensors[0])
    near = with_gradients(kernel, tensors, lengths, FP16)
    for index, name in enumerate(("q", "k", "v")):
        moved = list(tensors)
        moved[index] = far.copy_(tensors[index])
        ours = with_gradients(kernel, moved, lengths, FP16)
        assert all(torch.equal(ours[key], near[key]) for key in near), name


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_empty_stream(lengths: tuple[int, ...]) -> None:
    tensors = inputs(lengths, 2, 1, 16, FP32)
    results = with_gradients(kernel, tensors, lengths, FP32, window=3)
    assert results["out"].shape == (0, 2, 16)
    assert results["dk"].shape == (0, 1, 16)


def test_intervals_are_shared_while_cu_seqlens_is_the_same() -> None:
    cu_seqlens = cumulative((3, 0, 2))
    first, past = visible_intervals(cu_seqlens, 5, None)
    assert first.tolist() == [0, 0, 0, 3, 3]
    assert past.tolist() == [3, 3, 3, 5, 5]
    assert visible_intervals(cu_seqlens, 5, None)[0] is first
    assert visible_intervals(cu_seqlens, 5, 1)[0].tolist() == [0, 0, 1, 3, 3]
    cu_seqlens.copy_(cumulative((1, 1, 3)))
    assert visible_intervals(cu_seqlens, 5, None)[0].tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_operator_is_well_behaved(dropout_p: float) -> None:
    q, k, v, _ = inputs((4, 7), 2, 1, 16, FP32)
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    intervals = visible_intervals(cumulative((4, 7)), 11, 5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash_attention_op.operator, (*leaves, *intervals, 7, 0.25, 5.0, dropout_p, seed))


def test_compiles_without_a_break() -> None:
    """Another number of tokens too, which a compiler then takes for variable."""
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    options = {"window": 3, "dropout_p": 0.2}

    def compiled_kernel(q: Any, k: Any, v: Any, lengths: tuple[int, ...], **options: Any) -> torch.Tensor:
        scaled = AttentionOptions(q.shape[-1] ** -0.5, **options)
        seed = torch.tensor(5, device=DEVICE)
        out: torch.Tensor = compiled(q, k, v, cumulative(lengths), max(lengths), scaled, seed=seed)
        return out

    for lengths in ((4, 7), (6, 3, 9)):
        tensors = inputs(lengths, 2, 1, 16, FP32)
        plain, ours = (
            with_gradients(function, tensors, lengths, FP32, **options)
            for function in (partial(kernel, seed=5), compiled_kernel)
        )
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "never causal: use the torch backend"),
        ({"heads": (3, 2)}, "3 query heads are not a multiple of 2"),
        ({"head_dim": 264}, "head dim 264 exceeds 256"),
        ({"dtype": FP64}, "share one dtype of fp16, bf16, fp32"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    shape = {"heads": (2, 1), "head_dim": 16, "dtype": FP32}
    options = {key: value for key, value in change.items() if key not in shape}
    shape.update({key: value for key, value in change.items() if key in shape})
    q, k, v, _ = inputs((5,), *shape["heads"], shape["head_dim"], shape["dtype"])
    with pytest.raises(ValueError, match=message):
        kernel(q, k, v, (5,), **options)


@pytest.mark.parametrize("window", [0, None])
def test_a_token_that_sees_only_itself_gives_no_gradient_to_its_score(window: int | None) -> None:
    """Its weight is 1 whatever the score; what rounding leaves of a difference of equals is not written."""
    lengths = (1,) * (TILE + 3) if window is None else (TILE + 3, 5)
    results = with_gradients(kernel, inputs(lengths, 4, 2, 32, FP32), lengths, FP32, window=window)
    assert not results["dq"].any()
    assert not results["dk"].any()
    assert results["dv"].any()
