"""One attention function over several backends. It picks a backend, or refuses and says what can do it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm2vec_kernels.attention.backends import BACKENDS, AttentionNeeds, Backend
from llm2vec_kernels.attention.options import AttentionOptions

ATTENTION_NAMES = ("auto", *BACKENDS)


class AttentionBackend(NamedTuple):
    """The chosen way to compute packed attention, and the reason for the log."""

    name: str
    reason: str

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.name]


def choose_attention_backend(name: str = "auto", needs: AttentionNeeds | None = None) -> AttentionBackend:
    """Returns the backend for a name (`auto | triton | flash_attn | varlen | torch`), and the reason.

    `auto` takes Triton on a GPU that Triton supports, unless attention is causal. Else it takes torch.
    `LLM2VEC_TRITON=0` in the environment leaves only torch.

    Args:
        needs: what is known of the coming calls. None: they run on a CPU.

    Raises:
        ValueError: the name is unknown, or the named backend cannot do what is needed.
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
    """Computes attention inside each text of a packed stream: no padding, no leak from text to text.

    Args:
        q_THD: `[T, Hq, D]`; k_THD, v_THD: `[T, Hk, D]` with Hq a multiple of Hk.
        cu_seqlens: `[S+1]` int32, ascending from 0 to T. A text may be empty.
        max_seqlen: the longest text in tokens, or any upper bound. None takes T, which costs speed.
        options: what is computed. Dropout draws from torch's default generator.
        backend: a name for `choose_attention_backend`.
        seed: determines Triton's dropout instead of the generator: an int64 scalar on q's device. The other
            backends always draw.

    Returns:
        `[T, Hq, D]` in q's dtype.

    Raises:
        ValueError: the backend cannot do this. The message says what can.
    """
    needs = AttentionNeeds(
        q_THD.device, q_THD.dtype, q_THD.shape[2], q_THD.shape[1] != k_THD.shape[1], options
    )
    run = choose_attention_backend(backend, needs).backend.run
    longest = len(q_THD) if max_seqlen is None else max_seqlen
    return run(q_THD, k_THD, v_THD, cu_seqlens, longest, options, seed)
