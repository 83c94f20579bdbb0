"""One attention function over several backends: picks by what is asked for, refuses by name."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm2vec_kernels.attention.backends import BACKENDS, AttentionNeeds, Backend
from llm2vec_kernels.attention.options import AttentionOptions

ATTENTION_NAMES = ("auto", *BACKENDS)


class AttentionBackend(NamedTuple):
    """A way to compute packed attention, and why it was chosen (for the log)."""

    name: str
    reason: str

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.name]


def choose_attention_backend(name: str = "auto", needs: AttentionNeeds | None = None) -> AttentionBackend:
    """`auto | triton | flash_attn | varlen | torch` → the backend, and the reason.

    `auto` takes Triton on a GPU that it supports and for anything but causal attention, else torch;
    `LLM2VEC_TRITON=0` in the environment leaves it torch alone.

    Args:
        needs: what is known of the calls to come; None: a CPU's.

    Raises:
        ValueError: the name is unknown, or the backend asked for cannot do what is needed.
    """
    needs = needs or AttentionNeeds(torch.device("cpu"))
    if name not in ATTENTION_NAMES:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(ATTENTION_NAMES)}")
    if name != "auto":
        BACKENDS[name].assert_supported(needs)
        return AttentionBackend(name, "asked for")
    if needs.device.type != "cuda":
        return AttentionBackend("torch", f"auto: the device is {needs.device}")
    if missing := BACKENDS["triton"].lacks(needs):
        return AttentionBackend("torch", f"auto: not triton, {missing}")
    return AttentionBackend("triton", "auto: packed non-causal attention on CUDA")


def attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None = None,
    *,
    options: AttentionOptions,
    backend: str = "auto",
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside each text of a packed stream: no padding, no leak from text to text.

    Args:
        q_THD: `[T, Hq, D]`; k_THD, v_THD: `[T, Hk, D]` with Hq a multiple of Hk.
        cu_seqlens: `[S+1]` int32, ascending from 0 to T; a text may be empty.
        max_seqlen: the longest text in tokens, or any bound on it; None takes T, a bound that costs speed.
        options: what is computed; dropout draws from torch's default generator.
        backend: a name of `choose_attention_backend`.
        seed: what Triton's dropout follows from in place of the generator, an int64 scalar on q's device; the
            other backends always draw.

    Returns:
        `[T, Hq, D]` in q's dtype.

    Raises:
        ValueError: the backend cannot do this; the message says what can.
    """
    needs = AttentionNeeds(
        q_THD.device, q_THD.dtype, q_THD.shape[2], q_THD.shape[1] != k_THD.shape[1], options
    )
    run = choose_attention_backend(backend, needs).backend.run
    longest = len(q_THD) if max_seqlen is None else max_seqlen
    return run(q_THD, k_THD, v_THD, cu_seqlens, longest, options, seed)
