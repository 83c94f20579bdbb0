"""Our packed attention as a transformers attention implementation: for packed streams and for padded batches.

Registered as attention function *and* as mask function: the first alone would leave transformers without
a mask, and padding would be attended.
"""

from __future__ import annotations

from typing import Any

import torch
from llm2vec_kernels import AttentionBackend, attention
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface


def register(backend: AttentionBackend) -> str:
    """Makes packed attention through `backend` an `attn_implementation` of transformers; returns its name."""

    def run(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        return _attend(backend, module, query, key, value, attention_mask, **options), None

    name = f"llm2vec_{backend.name}"
    AttentionInterface.register(name, run)
    AttentionMaskInterface.register(name, _padding_mask)
    return name


def _padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """The `[B, L]` padding mask as it came: which pairs see each other follows from lengths alone."""
    return attention_mask


def _attend(
    backend: AttentionBackend,
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    mask_BL: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **ignored: Any,
) -> torch.Tensor:
    """`[B, L, H, D]`, the layout that transformers expects back. `cu_seq_lens_q` marks a packed stream."""
    if ignored.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported by the llm2vec attention")
    by_config = is_causal is not None
    causal = bool(is_causal) if by_config else bool(getattr(module, "is_causal", True))
    n_rows, _, length, head_dim = query_BHLD.shape
    q_THD, k_THD, v_THD = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHLD, key_BHLD, value_BHLD))
    real_T = None
    if cu_seq_lens_q is not None:
        cu_seqlens = cu_seq_lens_q
    elif mask_BL is None:
        cu_seqlens = torch.arange(0, (n_rows + 1) * length, length, dtype=torch.int32, device=q_THD.device)
    else:
        real_T = mask_BL.bool().flatten()
        lengths = mask_BL.bool().sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        q_THD, k_THD, v_THD = (x[real_T] for x in (q_THD, k_THD, v_THD))
    out_THD = attention(
        q_THD,
        k_THD,
        v_THD,
        cu_seqlens,
        softmax_scale=head_dim**-0.5 if scaling is None else scaling,
        window=_reach(sliding_window, inclusive=by_config and not causal),
        softcap=softcap,
        dropout_p=dropout,
        causal=causal,
        backend=backend,
    )
    if real_T is not None:
        padded = out_THD.new_zeros(len(real_T), *out_THD.shape[1:])
        out_THD = padded.masked_scatter(real_T[:, None, None], out_THD)
    return out_THD.unflatten(0, (n_rows, length))


def _reach(sliding_window: int | None, inclusive: bool) -> int | None:
    """transformers' window w as our inclusive reach.

    Bidirectional by `config.is_causal` keeps |i − j| ≤ w; causal keeps i − j < w, and a module that is
    bidirectional by a flag of its own (Gemma 3) |i − j| < w.
    """
    if sliding_window is None:
        return None
    return sliding_window if inclusive else sliding_window - 1
