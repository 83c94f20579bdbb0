"""Non-causal attention over a packed stream of texts, in Triton: a torch operator with a gradient.

It computes softmax(softcap(scale · q kᵀ) + mask) v inside each text. `reference.attention` is the
specification. Tiles go over the packed stream, not over texts. Short texts share a tile under a
block-diagonal mask. The keys of a tile are one range: from what its first query sees to what its last query
sees. There is no padding and no autotuning, and the host never waits for the device. There are no atomics,
so backward gives the same bits every time.

Shape legend: T tokens of all texts, S texts, Hq query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

from llm2vec_kernels.attention.options import AttentionOptions
from llm2vec_kernels.attention.tile_sizes import MAX_HEAD_DIM, Tile, padded_head_dim, tiles_on
from llm2vec_kernels.attention.triton_backward import dkdv_kernel, dq_kernel
from llm2vec_kernels.attention.triton_forward import forward_kernel
from llm2vec_kernels.operation import Operation
from llm2vec_kernels.seeds import drawn_seed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = bool(triton.knobs.runtime.interpret)


def flash_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    options: AttentionOptions,
    *,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes attention inside each text of a packed stream. Forward and backward run in Triton.

    Args:
        q_THD: `[T, Hq, D]` fp16, bf16 or fp32; k_THD, v_THD: `[T, Hk, D]`, Hq a multiple of Hk.
        cu_seqlens: `[S+1]` int32, ascending from 0 to T. A text may be empty.
        max_seqlen: the longest text in tokens, or any upper bound. It only chooses tile sizes.
        seed: decides which weights are dropped, an int64 scalar on q's device. None draws one from torch's
            default CPU generator, which `torch.manual_seed` and activation checkpointing reset.

    Returns:
        `[T, Hq, D]` in q's dtype.

    Raises:
        ValueError: the kernels do not support these shapes, dtypes or options.
    """
    check_arguments(q_THD, k_THD, v_THD, cu_seqlens, options)
    first_T, past_T = visible_intervals(cu_seqlens, len(q_THD), options.window)
    scale, softcap, dropout_p = options.softmax_scale, options.softcap, options.dropout_p
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = drawn_seed(q_THD.device)
    out_THD: torch.Tensor = flash_attention_op(
        q_THD, k_THD, v_THD, first_T, past_T, max_seqlen, scale, softcap, dropout_p, seed
    )[0]
    return out_THD


def check_arguments(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    options: AttentionOptions,
) -> None:
    """Raises a ValueError that names the first thing the kernels do not support."""
    tokens, heads, head_dim = q_THD.shape
    if k_THD.shape != v_THD.shape or k_THD.shape[0] != tokens or k_THD.shape[2] != head_dim:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_THD, k_THD, v_THD))
        raise ValueError(f"q, k, v must be [T, Hq, D], [T, Hk, D], [T, Hk, D], not {shapes}")
    if heads % k_THD.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {k_THD.shape[1]} key/value heads")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dim {head_dim} exceeds {MAX_HEAD_DIM}: use the torch backend")
    if q_THD.dtype not in DTYPES or not q_THD.dtype == k_THD.dtype == v_THD.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (q_THD, k_THD, v_THD))
        raise ValueError(f"q, k, v must share one dtype of fp16, bf16, fp32, not {dtypes}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [S+1] int32, not {cu_seqlens.dtype} of {cu_seqlens.dim()} dims")
    if options.causal:
        raise ValueError("the Triton kernels are never causal: use the torch backend")
    if not q_THD.is_cuda and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {q_THD.device}: use the torch backend, or set "
            "TRITON_INTERPRET=1 before the import to run them slowly on a CPU"
        )


_intervals_of = WeakIdKeyDictionary()


def visible_intervals(
    cu_seqlens: torch.Tensor, n_tokens: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what each token sees: `first [T]` and `past [T]` int32. Token i sees first[i] <= j < past[i].

    Intervals are kept while `cu_seqlens` lives unchanged. So a model's layers share them.
    """
    if torch.compiler.is_compiling() or cu_seqlens.is_inference():
        # A compiler shares them by itself. A tensor made under inference mode does not show when it changes.
        return _visible_intervals(cu_seqlens, n_tokens, window)
    kept = _intervals_of.setdefault(cu_seqlens, {})
    # Tensors made under inference mode must not reach a later backward, so they have a key of their own.
    key = (cu_seqlens._version, n_tokens, window, torch.is_inference_mode_enabled())
    if key not in kept:
        kept[key] = _visible_intervals(cu_seqlens, n_tokens, window)
    intervals: tuple[torch.Tensor, torch.Tensor] = kept[key]
    return intervals


def _visible_intervals(
    cu_seqlens: torch.Tensor, n_tokens: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    token_T = torch.arange(n_tokens, device=cu_seqlens.device, dtype=torch.int32)
    text_T = torch.searchsorted(cu_seqlens[1:].int(), token_T, right=True).clamp(max=len(cu_seqlens) - 2)
    first_T, past_T = cu_seqlens[text_T].int(), cu_seqlens[text_T + 1].int()
    if window is not None:
        first_T = torch.maximum(first_T, token_T - window)
        past_T = torch.minimum(past_T, token_T + window + 1)
    return first_T, past_T


def _flash_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    first_T: torch.Tensor,
    past_T: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out `[T, Hq, D]` and the log-sum-exp `[Hq, T]` fp32 in units of log 2. `seed`: int64 scalar."""
    q_THD, k_THD, v_THD = map(_rows_contiguous, (q_THD, k_THD, v_THD))
    tokens, heads, head_dim = q_THD.shape
    out_THD = q_THD.new_empty(q_THD.shape)
    lse_HT = q_THD.new_empty((heads, tokens), dtype=torch.float32)
    if tokens:
        tile = tiles_on(q_THD.device, q_THD.dtype, head_dim, max_seqlen).forward
        shared = _shared_arguments(q_THD, k_THD, v_THD, softmax_scale, softcap, dropout_p, seed)
        with torch.cuda.device_of(q_THD):
            forward_kernel[(triton.cdiv(tokens, tile.rows), heads)](
                q_THD, k_THD, v_THD, out_THD, lse_HT, first_T, past_T,
                **shared, **_launch(tile, BLOCK_M=tile.rows, BLOCK_N=tile.columns),
            )  # fmt: skip
    return out_THD, lse_HT


def _shapes(q_THD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_HT = q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=torch.float32)
    return q_THD.new_empty(q_THD.shape), lse_HT


def _flash_attention_backward(
    dout_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_HT: torch.Tensor,
    first_T: torch.Tensor,
    past_T: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dq `[T, Hq, D]`, dk and dv `[T, Hk, D]`."""
    q_THD, k_THD, v_THD = map(_rows_contiguous, (q_THD, k_THD, v_THD))
    dout_THD = dout_THD.contiguous()
    tokens, heads, head_dim = q_THD.shape
    dq_THD, dk_THD, dv_THD = (x.new_empty(x.shape) for x in (q_THD, k_THD, v_THD))
    delta_HT = torch.empty_like(lse_HT)
    if tokens:
        tiles = tiles_on(q_THD.device, q_THD.dtype, head_dim, max_seqlen)
        shared = _shared_arguments(q_THD, k_THD, v_THD, softmax_scale, softcap, dropout_p, seed)
        with torch.cuda.device_of(q_THD):
            tile = tiles.dq  # this kernel runs first: it also writes delta, which the other one reads
            dq_kernel[(triton.cdiv(tokens, tile.rows), heads)](
                q_THD, k_THD, v_THD, out_THD, dout_THD, dq_THD, lse_HT, delta_HT, first_T, past_T,
                **shared, **_launch(tile, BLOCK_M=tile.rows, BLOCK_N=tile.columns),
            )  # fmt: skip
            tile = tiles.dkdv
            dkdv_kernel[(triton.cdiv(tokens, tile.rows), k_THD.shape[1])](
                q_THD, k_THD, v_THD, dout_THD, dk_THD, dv_THD, lse_HT, delta_HT, first_T, past_T,
                **shared, **_launch(tile, BLOCK_M=tile.columns, BLOCK_N=tile.rows),
            )  # fmt: skip
    return dq_THD, dk_THD, dv_THD


def _gradient_shapes(
    dout_THD: torch.Tensor, q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape), k_THD.new_empty(k_THD.shape), v_THD.new_empty(v_THD.shape)


def _rows_contiguous(x_THD: torch.Tensor) -> torch.Tensor:
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def _shared_arguments(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    softmax_scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> dict[str, Any]:
    """Returns the arguments that all three kernels share."""
    strides = {
        f"{name}_stride_{dim}": x.stride(axis)
        for name, x in (("q", q_THD), ("k", k_THD), ("v", v_THD))
        for axis, dim in enumerate("th")
    }
    head_dim = q_THD.shape[2]
    return {
        **strides,
        "n_tokens": len(q_THD),
        "scale": softmax_scale,
        "softcap": softcap or 1.0,
        "dropout_p": dropout_p,
        "seed_ptr": seed,
        "D": head_dim,
        "GROUP": q_THD.shape[1] // k_THD.shape[1],
        "HAS_SOFTCAP": softcap is not None,
        "HAS_DROPOUT": dropout_p > 0,
        "BLOCK_D": padded_head_dim(head_dim),
    }


def _launch(tile: Tile, **blocks: int) -> dict[str, Any]:
    return {
        **blocks,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q_THD, k_THD, v_THD, first_T, past_T, *options, seed = inputs
    ctx.save_for_backward(q_THD, k_THD, v_THD, *output, first_T, past_T, seed)
    ctx.options = options


def _backward(ctx: Any, dout_THD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = flash_attention_backward_op(dout_THD, *tensors, *ctx.options, seed)
    return (*gradients, *[None] * (3 + len(ctx.options)))


flash_attention_backward_op = Operation(
    "llm2vec::flash_attention_backward", _flash_attention_backward, _gradient_shapes
)
flash_attention_op = Operation("llm2vec::flash_attention", _flash_attention, _shapes).with_gradient(
    _save_for_backward, _backward
)
