"""The backends of packed attention, each with a check of what it cannot do.

Shape legend: T tokens of all texts, Hq query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from llm2vec_kernels.attention.options import AttentionOptions
from llm2vec_kernels.attention.tile_sizes import card_of
from llm2vec_kernels.attention.torch import torch_attention
from llm2vec_kernels.devices import triton_refusal

HALF = (torch.float16, torch.bfloat16)
OURS = (*HALF, torch.float32)
# FlashAttention-3 is the package flash_attn_interface.
PACKAGES = ("flash_attn", "flash_attn_interface")
INSTALLED = frozenset(name for name in PACKAGES if importlib.util.find_spec(name) is not None)

# Every backend takes any scale. So a check that runs before the scale is known may use any value.
ANY_SCALE = AttentionOptions(softmax_scale=1.0)


class AttentionNeeds(NamedTuple):
    """What a backend must do. None: not known yet, and checked again once it is.

    This is a tuple because every call makes one. A frozen dataclass takes twice as long.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    grouped: bool = False
    options: AttentionOptions = ANY_SCALE


class Run(Protocol):
    """Packed attention, `[T, Hq, D]`; see `api.attention`."""

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        options: AttentionOptions,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A named way to compute attention.

    Attributes:
        lacks: returns the first thing that it cannot do, and what to do instead. None: it can do all.
    """

    name: str
    lacks: Callable[[AttentionNeeds], str | None]
    run: Run

    def assert_supported(self, needs: AttentionNeeds) -> None:
        """Raises ValueError that names what the backend cannot do, and what can."""
        if missing := self.lacks(needs):
            raise ValueError(f"attention backend {self.name!r}: {missing}")


def _gpu_backend_lacks(needs: AttentionNeeds, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Checks the limits that the three GPU backends share."""
    if needs.options.causal:
        return "causal attention is not supported: use attention `torch`, the causal baseline"
    if needs.dtype is not None and needs.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"dtype {needs.dtype} is not supported, only {names}: change precision, or use `torch`"
    if needs.head_dim is not None and needs.head_dim > 256:
        return f"head dim {needs.head_dim} exceeds 256: use attention `torch`"
    return None


def _no_cuda(needs: AttentionNeeds) -> str | None:
    if needs.device.type == "cuda":
        return None
    return f"it needs a CUDA device, not {needs.device}: use attention `torch`"


def _triton_lacks(needs: AttentionNeeds) -> str | None:
    if refusal := triton_refusal(needs.device, interpreter_too=True):
        return f"{refusal}: use attention `torch`"
    if missing := _gpu_backend_lacks(needs, OURS):
        return missing
    if needs.device.type != "cuda":
        return None
    try:
        card_of(needs.device)
    except ValueError as error:
        return str(error)
    return None


def _run_triton(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    options: AttentionOptions,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    from llm2vec_kernels.attention.triton import flash_attention

    return flash_attention(q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, options, seed=seed)


def flash_attn_version() -> int:
    """Returns the version of the newest FlashAttention that is installed. 0: none."""
    if "flash_attn_interface" in INSTALLED:
        return 3
    return 2 if "flash_attn" in INSTALLED else 0


def _flash_attn_lacks(needs: AttentionNeeds) -> str | None:
    version = flash_attn_version()
    if version == 0:
        return "package flash_attn is not installed: install it, or use attention `auto`"
    if missing := _gpu_backend_lacks(needs, HALF) or _no_cuda(needs):
        return missing
    if needs.head_dim is not None and needs.head_dim % 8:
        return f"head dim {needs.head_dim} is not a multiple of 8: use attention `triton`"
    if needs.options.dropout_p > 0 and version == 3:
        return "FlashAttention-3 has no dropout: use attention `triton`, or set attention_dropout: 0"
    if needs.options.dropout_p > 0 and needs.options.softcap is not None:
        return "FlashAttention-2 has no dropout beside a softcap: use attention `triton`"
    return None


def _run_flash_attn(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    options: AttentionOptions,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    window = -1 if options.window is None else options.window
    theirs: dict[str, Any] = {
        "softmax_scale": options.softmax_scale,
        "window_size": (window, window),
        "softcap": options.softcap or 0.0,
        "deterministic": True,
    }
    if flash_attn_version() == 3:
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func

        theirs["dropout_p"] = options.dropout_p
    out = flash_attn_varlen_func(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **theirs
    )
    # Some releases of FlashAttention-3 return the log-sum-exp too.
    out_THD: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return out_THD


def _varlen_parameters() -> set[str]:
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def _varlen_lacks(needs: AttentionNeeds) -> str | None:
    if missing := _gpu_backend_lacks(needs, HALF) or _no_cuda(needs):
        return missing
    if needs.options.softcap is not None:
        return "torch's varlen attention has no softcap: use attention `triton`"
    if needs.options.dropout_p > 0:
        return "torch's varlen attention has no dropout: use attention `triton`, or set attention_dropout: 0"
    wanted = {"scale": True, "window_size": needs.options.window is not None, "enable_gqa": needs.grouped}
    absent = [name for name, needed in wanted.items() if needed and name not in _varlen_parameters()]
    if absent:
        return f"varlen of torch {torch.__version__} has no {absent[0]}: use a newer torch, or `triton`"
    return None


def _run_varlen(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    options: AttentionOptions,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    theirs: dict[str, Any] = {"scale": options.softmax_scale}
    if options.window is not None:
        theirs["window_size"] = (options.window, options.window)
    if q_THD.shape[1] != k_THD.shape[1]:
        theirs["enable_gqa"] = True
    out_THD: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **theirs
    )
    return out_THD


def _run_torch(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    options: AttentionOptions,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch_attention(q_THD, k_THD, v_THD, cu_seqlens, options)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", _triton_lacks, _run_triton),
        Backend("flash_attn", _flash_attn_lacks, _run_flash_attn),
        Backend("varlen", _varlen_lacks, _run_varlen),
        Backend("torch", lambda needs: None, _run_torch),
    )
}
