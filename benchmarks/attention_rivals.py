"""The ways to compute attention that `attention.py` compares. Each gives a function without arguments.

Shape legend: T tokens of all texts, N texts, L length with padding, H heads, D head dim.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from llm2vec_kernels.attention import AttentionNeeds, AttentionOptions, attention, choose_attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Problem:
    """One packed stream of texts. A share `dropout_p` of its attention weights is dropped."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dropout_p: float
    device: torch.device
    dtype: torch.dtype

    @property
    def forward_flops(self) -> int:
        """Counts two matrix products over the pairs that see each other, without padding."""
        return 4 * self.heads * self.head_dim * sum(length**2 for length in self.lengths)

    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Returns q, k and v that require gradients."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = [(sum(self.lengths), heads, self.head_dim) for heads in (self.heads, *[self.kv_heads] * 2)]
        make = partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)
        return [make(shape).requires_grad_() for shape in shapes]


@dataclass(frozen=True)
class Contender:
    """`run()` computes the output from `leaves`. `setup_ms` is the time of untimed preparation."""

    name: str
    run: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    setup_ms: float = 0.0


OURS = ("triton", "flash_attn")
"""Contenders that are not part of torch."""


def options_of(problem: Problem) -> AttentionOptions:
    return AttentionOptions(problem.head_dim**-0.5, dropout_p=problem.dropout_p)


def needs_of(problem: Problem) -> AttentionNeeds:
    return AttentionNeeds(
        problem.device,
        problem.dtype,
        problem.head_dim,
        grouped=problem.heads != problem.kv_heads,
        options=options_of(problem),
    )


def chosen_by_auto(problem: Problem) -> str:
    """Returns the contender that the product's `attention: auto` chooses."""
    return choose_attention_backend("auto", needs_of(problem)).name


def packed(problem: Problem, backend: str) -> Contender:
    """One of our backends, called as the model calls it."""
    choose_attention_backend(backend, needs_of(problem))
    tensors = problem.tensors()
    packed_stream = (*tensors, problem.cu_seqlens(), max(problem.lengths))
    run = partial(attention, *packed_stream, options=options_of(problem), backend=backend)
    return Contender(backend, run, tensors)


def sdpa(problem: Problem, name: str, backend: SDPBackend) -> Contender:
    """`scaled_dot_product_attention`. Texts of different lengths are padded and masked, as in models."""
    n_texts, length = len(problem.lengths), max(problem.lengths)
    lengths_N = torch.tensor(problem.lengths, device=problem.device)
    real_NL = torch.arange(length, device=problem.device)[None] < lengths_N[:, None]
    mask = None if bool(real_NL.all()) else real_NL[:, None, None, :]
    leaves = [
        x.new_zeros(n_texts, length, *x.shape[1:])
        .masked_scatter(real_NL[:, :, None, None], x.detach())
        .transpose(1, 2)
        .contiguous()
        .requires_grad_()
        for x in problem.tensors()
    ]

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *leaves,
                attn_mask=mask,
                dropout_p=problem.dropout_p,
                enable_gqa=problem.heads != problem.kv_heads,
            )

    return Contender(name, run, leaves)


def flex(problem: Problem) -> Contender:
    """FlexAttention over the packed stream with a mask of texts. Making the mask counts as `setup_ms`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.dropout_p > 0:
        raise ValueError("FlexAttention has no dropout")
    torch._dynamo.reset()
    total = sum(problem.lengths)
    text_T = torch.repeat_interleave(
        torch.arange(len(problem.lengths), device=problem.device),
        torch.tensor(problem.lengths, device=problem.device),
    )

    def same_text(b: Any, h: Any, i: Any, j: Any) -> Any:
        return text_T[i] == text_T[j]

    make_mask = partial(
        torch.compile(create_block_mask), same_text, None, None, total, total, device=problem.device
    )
    make_mask()
    torch.cuda.synchronize()
    started = time.perf_counter()
    block_mask = make_mask()
    torch.cuda.synchronize()
    setup_ms = 1e3 * (time.perf_counter() - started)
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in problem.tensors()]
    grouped = problem.heads != problem.kv_heads
    run = partial(compiled, *leaves, block_mask=block_mask, enable_gqa=grouped)
    return Contender("flex", run, leaves, setup_ms)


def contenders(problem: Problem, with_flex: bool) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Returns names and makers, ours first. A maker or the first run may refuse the problem."""
    yield "triton", partial(packed, problem, "triton")
    if problem.device.type == "cpu":
        yield "torch", partial(packed, problem, "torch")
        return
    yield "varlen", partial(packed, problem, "varlen")
    yield "flash_attn", partial(packed, problem, "flash_attn")
    if len(set(problem.lengths)) == 1:
        yield "sdpa_flash", partial(sdpa, problem, "sdpa_flash", SDPBackend.FLASH_ATTENTION)
        yield "sdpa_cudnn", partial(sdpa, problem, "sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)
    else:
        yield "sdpa_padded", partial(sdpa, problem, "sdpa_padded", SDPBackend.EFFICIENT_ATTENTION)
    if with_flex:
        yield "flex", partial(flex, problem)
