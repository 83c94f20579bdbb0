"""Registers our packed attention in transformers, for packed streams and for padded batches.

It is registered as attention function *and* as mask function. With the first alone, transformers would make
no mask, and tokens would attend to padding.

Shape legend: B rows, L length with padding, H heads, D head dim, T = B·L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from llm2vec_kernels.attention import ATTENTION_NAMES, AttentionOptions, attention
from llm2vec_kernels.attention.api import choose_attention_backend
from llm2vec_kernels.attention.backends import AttentionNeeds
from llm2vec_kernels.seeds import Seeds
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from llm2vec_ds.model.bidirectional import is_causal

NAME = "llm2vec"


def register(backend: str = "auto") -> str:
    """Makes packed attention an `attn_implementation` of transformers. Returns its name.

    `llm2vec` chooses a backend for each call. `llm2vec_<backend>` always uses that backend, and refuses what
    it cannot do. Both work for any caller of transformers.

    Raises:
        ValueError: the backend is unknown.
    """
    if backend not in ATTENTION_NAMES:
        raise ValueError(f"unknown attention backend {backend!r}: choose one of {', '.join(ATTENTION_NAMES)}")

    def run(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        return _attend(backend, module, query, key, value, attention_mask, **options), None

    name = NAME if backend == "auto" else f"{NAME}_{backend}"
    AttentionInterface.register(name, run)
    AttentionMaskInterface.register(name, _padding_mask)
    return name


def register_for(trunk: Any) -> None:
    """Registers the implementation of a trunk that came from another process, if it is one of ours."""
    name = trunk.config._attn_implementation
    if name is not None and name.partition("_")[0] == NAME:
        register(_asked_backend(name))


def _asked_backend(implementation: str) -> str:
    """Returns the backend that the name of an attention implementation asks for."""
    return implementation.removeprefix(NAME).removeprefix("_") or "auto"


def attention_needs(
    config: Any, *, causal: bool, device: torch.device, dtype: torch.dtype, dropout_p: float = 0.0
) -> AttentionNeeds:
    """Returns what the attention of a text model needs from a backend.

    Args:
        config: of a text model.
    """
    options = AttentionOptions(
        softmax_scale=1.0,  # each layer names its own
        softcap=getattr(config, "attn_logit_softcapping", None),
        dropout_p=dropout_p,
        causal=causal,
    )
    return AttentionNeeds(device, dtype, head_dim_of(config), options=options)


def backend_of(trunk: Any) -> str:
    """Returns the name of the attention backend that a trunk with our attention uses."""
    config = trunk.config.get_text_config()
    device = next(trunk.parameters()).device
    needs = attention_needs(config, causal=bool(is_causal(config)), device=device, dtype=trunk.dtype)
    return choose_attention_backend(_asked_backend(config._attn_implementation), needs).name


def head_dim_of(config: Any) -> int | None:
    """Returns the width of a head in most layers. None if the config does not say it.

    Reads the dictionary: in Gemma 4 some layers have another width, and reading the attribute is an error.
    """
    value: int | None = config.to_dict().get("head_dim")
    return value


def _padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """Returns the `[B, L]` padding mask unchanged. Lengths alone say which tokens see each other."""
    return attention_mask


def _attend(
    backend: str,
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
    max_length_q: int | None = None,
    dropout_seeds: Seeds | None = None,
    **ignored: Any,
) -> torch.Tensor:
    """Returns `[B, L, H, D]`, the layout that transformers expects.

    `cu_seq_lens_q` marks a packed stream. `dropout_seeds` replace torch's generator.
    """
    _refuse(query_BHLD, key_BHLD, mask_BL, ignored)
    by_config = is_causal is not None
    causal = bool(is_causal) if by_config else bool(getattr(module, "is_causal", True))
    n_rows, _, length, head_dim = query_BHLD.shape
    width = value_BHLD.shape[-1]
    tensors_BHLD: tuple[torch.Tensor, ...] = (query_BHLD, key_BHLD, value_BHLD)
    if width != head_dim:
        tensors_BHLD = _of_one_width(tensors_BHLD)
    q_THD, k_THD, v_THD = (_packed(x) for x in tensors_BHLD)
    order_T = None
    if cu_seq_lens_q is not None:
        cu_seqlens, max_seqlen = cu_seq_lens_q, max_length_q
    else:
        order_T, cu_seqlens = _rows_as_texts(mask_BL, n_rows, length, q_THD.device)
        max_seqlen = length
    if order_T is not None:
        q_THD, k_THD, v_THD = (x[order_T] for x in (q_THD, k_THD, v_THD))
    if module.__dict__.get("attn_temperature_tuning") and not module.use_rope:
        place_T = torch.arange(len(q_THD), device=q_THD.device) if order_T is None else order_T
        q_THD = _with_own_temperature(module, q_THD, cu_seqlens, place_T % length)
    if (chunk := _chunk_of(module)) is not None and (max_seqlen is None or chunk < max_seqlen):
        cu_seqlens, max_seqlen = _cut(cu_seqlens, chunk), chunk
    options = AttentionOptions(
        head_dim**-0.5 if scaling is None else scaling,
        window=_reach(sliding_window, inclusive=by_config and not causal),
        softcap=softcap,
        dropout_p=dropout,
        causal=causal,
    )
    seed = dropout_seeds.next() if dropout_seeds is not None and dropout > 0 else None
    out_THD = attention(
        q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, options=options, backend=backend, seed=seed
    )
    if order_T is not None:
        out_THD = torch.empty_like(out_THD).index_copy(0, order_T, out_THD)
    if out_THD.shape[-1] != width:
        out_THD = out_THD[..., :width]
    return out_THD[None] if n_rows == 1 else out_THD.reshape(n_rows, length, *out_THD.shape[1:])


def _packed(x_BHLD: torch.Tensor) -> torch.Tensor:
    """Returns `[B·L, H, D]`. A single row becomes a view. Several rows may need a copy."""
    if len(x_BHLD) == 1:
        return x_BHLD[0].transpose(0, 1)
    return x_BHLD.transpose(1, 2).flatten(0, 1)


def _of_one_width(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Fills the narrower of queries, keys and values up with zeros. Latent attention has narrower values
    (DeepSeek-V2, arXiv 2405.04434).

    Zeros change no score. The columns that they add to the output are cut off.
    """
    widest = max(x.shape[-1] for x in tensors)
    return tuple(F.pad(x, (0, widest - x.shape[-1])) for x in tensors)


def _with_own_temperature(
    module: Any, q_THD: torch.Tensor, cu_seqlens: torch.Tensor, place_T: torch.Tensor
) -> torch.Tensor:
    """Corrects the temperature of queries in Llama 4's layers without RoPE.

    Such queries grow with their place in the text (arXiv 2501.19399). transformers takes their place in the
    row, `place_T`. If texts are packed or padded, the two places differ.
    """

    def temperature(place: torch.Tensor) -> torch.Tensor:
        steps = torch.floor((place.float() + 1.0) / module.floor_scale)
        return torch.log1p(steps) * module.attn_scale + 1.0

    token_T = torch.arange(len(q_THD), device=q_THD.device)
    own_T = token_T - cu_seqlens[torch.searchsorted(cu_seqlens, token_T, right=True) - 1]
    return q_THD * (temperature(own_T) / temperature(place_T)).to(q_THD.dtype)[:, None, None]


def _chunk_of(module: nn.Module) -> int | None:
    """Returns the chunk length of a layer with chunked attention (Llama 4). None for any other layer.

    Tokens see each other within a chunk. transformers puts this into the mask, which is not made here.
    """
    config: Any = module.__dict__.get("config")
    number: int | None = module.__dict__.get("layer_idx")
    types = getattr(config, "layer_types", None)
    if types is None or number is None or types[number % len(types)] != "chunked_attention":
        return None
    chunk: int | None = config.attention_chunk_size
    return chunk


def _cut(cu_seqlens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Returns the `cu_seqlens` of all chunks, `[n_chunks + 1]`. The last chunk of a text may be shorter."""
    n_chunks_S = (cu_seqlens.diff() + chunk - 1) // chunk
    first_S = n_chunks_S.cumsum(0) - n_chunks_S
    number = torch.arange(int(n_chunks_S.sum()), device=cu_seqlens.device)
    starts = (cu_seqlens[:-1] - chunk * first_S).repeat_interleave(n_chunks_S) + chunk * number
    return torch.cat([starts, cu_seqlens[-1:]]).to(cu_seqlens.dtype)


def _refuse(
    query_BHLD: torch.Tensor, key_BHLD: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    if options.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported by the llm2vec attention")
    if query_BHLD.shape[1] % key_BHLD.shape[1]:
        raise ValueError(
            f"{query_BHLD.shape[1]} query heads cannot share {key_BHLD.shape[1]} key/value heads evenly"
        )
    if query_BHLD.shape[2] != key_BHLD.shape[2]:
        raise ValueError("the llm2vec attention has no key/value cache: pass use_cache=False")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"the llm2vec attention takes a padding mask [rows, length], not one of {mask.dim()} dimensions"
        )


def _rows_as_texts(
    mask_BL: torch.Tensor | None, n_rows: int, length: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns the order of the tokens (None: as they are) and the `cu_seqlens` of a padded batch."""
    if mask_BL is None:
        return None, torch.arange(0, (n_rows + 1) * length, length, dtype=torch.int32, device=device)
    return _padding_last(mask_BL)


def _padding_last(mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an order of the B·L tokens that makes a packed stream, and its `cu_seqlens [2B+1]`.

    The real tokens of all rows come first. Then each row's padding follows as a separate text, which no real
    token sees. Shapes depend on no value, so nothing waits for the device, and a compiler sees no break.
    """
    n_rows = len(mask_BL)
    real_BL = mask_BL.bool()
    row_B = torch.arange(n_rows, device=mask_BL.device)
    order_T = torch.argsort((row_B[:, None] + n_rows * ~real_BL).flatten(), stable=True)
    lengths = torch.cat([real_BL.sum(1), (~real_BL).sum(1)])
    return order_T, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def _reach(sliding_window: int | None, inclusive: bool) -> int | None:
    """Converts transformers' window w into our inclusive reach.

    A module that is bidirectional by `config.is_causal` keeps |i − j| ≤ w. A causal module keeps i − j < w. A
    module that is bidirectional by its own flag (Gemma 3) keeps |i − j| < w.
    """
    if sliding_window is None:
        return None
    return sliding_window if inclusive else sliding_window - 1
