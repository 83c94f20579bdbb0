"""One attention function over several backends: picks by what is asked for, refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm2vec_kernels.torch_attention import torch_attention


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute packed attention, and why it was chosen (for the log)."""

    name: str
    reason: str
    run: Callable[..., torch.Tensor]


def choose_attention_backend(name: str = "auto") -> AttentionBackend:
    """`auto | torch` → the backend.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "torch":
        return AttentionBackend("torch", "asked for", torch_attention)
    if name == "auto":
        return AttentionBackend("torch", "auto: it runs on every device and dtype", torch_attention)
    raise ValueError(f"unknown attention backend {name!r}: choose auto or torch")


def attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    backend: AttentionBackend | None = None,
) -> torch.Tensor:
    """Attention inside each text of a packed stream: no padding, no leak from text to text.

    Args:
        q_THD: `[T, Hq, D]`; k_THD, v_THD: `[T, Hk, D]` with Hq a multiple of Hk.
        cu_seqlens: `[S+1]` int32, ascending from 0 to T; a text may be empty.
        window: inclusive reach, |i − j| ≤ window; None sees the whole text.
        softcap: c in c·tanh(score / c); None leaves scores as they are.
        dropout_p: share of attention weights dropped, from torch's default generator.
        causal: keys after the query are hidden (for the causal baseline only).
        backend: from `choose_attention_backend`; None chooses.

    Returns:
        `[T, Hq, D]` in q's dtype.
    """
    backend = backend or choose_attention_backend()
    return backend.run(
        q_THD,
        k_THD,
        v_THD,
        cu_seqlens,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        causal=causal,
    )
