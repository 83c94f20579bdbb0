"""Replaces a trunk's norms, gated units and rotary embeddings by one operation each.

Layers are recognised by their code, not by the model's name. A class whose `forward` has the same bytecode as
that of transformers' Llama or Gemma computes the same. So the operation may replace it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from llm2vec_kernels.row_ops.api import gated_unit, rms_norm, rotate, runs_on
from torch import nn
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama

from llm2vec_ds.model.origins import note_origin

ROTARY = "apply_rotary_pos_emb"
SILU = (nn.SiLU, type(llama.ACT2FN["silu"]))
GELU_TANH = type(llama.ACT2FN["gelu_pytorch_tanh"])


def fuse_layers(trunk: nn.Module) -> Counter[str]:
    """Changes the class of each layer that can be fused. Returns the number of layers of each kind.

    Parameters, their names and hooks stay. Unknown layers stay as they are. On a device where the operations
    do not run, a fused layer runs its original code.
    """
    fused: Counter[str] = Counter()
    for module in trunk.modules():
        kind = _kind(module)
        if kind is not None:
            kept: Any = type(module)
            module.__class__ = _fused_class(kept, kind)
            fused[kind] += 1
    return fused


def _kind(module: nn.Module) -> str | None:
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    if _same_code(forward, llama.LlamaRMSNorm.forward):
        return "RMSNorm"
    if _is_gemmas_norm(type(module)):
        return "RMSNorm + 1"
    if _same_code(forward, llama.LlamaMLP.forward):
        if isinstance(module.act_fn, SILU):
            return "SwiGLU"
        if isinstance(module.act_fn, GELU_TANH):
            return "GeGLU"
    if ROTARY in forward.__code__.co_names and _same_code(
        forward.__globals__.get(ROTARY), llama.apply_rotary_pos_emb
    ):
        return "rotary embedding"
    return None


def _is_gemmas_norm(kind: Any) -> bool:
    """Says whether a class is Gemma's norm. It stores its weight minus 1, and part of its code is `_norm`."""
    return _same_code(kind.forward, gemma.GemmaRMSNorm.forward) and _same_code(
        getattr(kind, "_norm", None), gemma.GemmaRMSNorm._norm
    )


def _same_code(function: Any, known: Any) -> bool:
    """Says whether two functions compute the same, however their source is written.

    Compares instructions, names, constants (without the docstring), defaults and enclosed variables. Compares
    the functions of their modules that they call in the same way.
    """
    if not isinstance(function, FunctionType) or not isinstance(known, FunctionType):
        return False
    a, b = function.__code__, known.__code__
    if a.co_code != b.co_code or a.co_names != b.co_names:
        return False
    if _bound_values(function) != _bound_values(known):
        return False
    texts = (function.__doc__, known.__doc__)
    if [c for c in a.co_consts if c not in texts] != [c for c in b.co_consts if c not in texts]:
        return False
    called = [name for name in b.co_names if isinstance(known.__globals__.get(name), FunctionType)]
    return all(_same_code(function.__globals__.get(name), known.__globals__[name]) for name in called)


def _bound_values(function: FunctionType) -> tuple[Any, ...]:
    """Returns the values that a call uses beside its arguments: defaults and enclosed variables.

    Leaves out `__class__`, which every method with `super()` encloses. It differs for each class.
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    enclosed = {name: cell.cell_contents for name, cell in cells if name != "__class__"}
    return function.__defaults__, function.__kwdefaults__, enclosed


@cache
def _fused_class(kept: Any, kind: str) -> Any:
    """Makes a subclass of `kept` with the same name, so code that asks for the type sees no change."""
    forward = FORWARDS.get(kind)
    changed = _where_it_runs(forward, kept.forward) if forward else _with_fused_rotary(kept.forward)

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Serves pickle and copy. They look a class up by its name, and would find `kept`."""
        return _empty, (kept, kind), self.__dict__

    members = {
        "forward": changed,
        "fused_kind": kind,
        "is_recomputed": False,
        "__reduce_ex__": reduced,
        "__module__": kept.__module__,
    }
    return type(kept.__name__, (kept,), members)


def _empty(kept: Any, kind: str) -> Any:
    fused = _fused_class(kept, kind)
    return fused.__new__(fused)


def _where_it_runs(fused: Callable[[Any, torch.Tensor], torch.Tensor], plain: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (fused if runs_on(hidden_states.device) else plain)(self, hidden_states)
        return out

    return forward


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _normed(self, hidden_states, self.variance_epsilon, False)


def _gemmas_rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _normed(self, hidden_states, self.eps, True)


def _normed(norm: Any, x: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    weight = norm.weight
    out: torch.Tensor = rms_norm(x, weight, eps, plus_one)[0]
    if not norm.is_recomputed:
        return out
    # The norm is recomputed in a linear layer's backward. There ZeRO-3 has gathered the weights of that
    # layer, but not the norm's. So a copy is kept.
    whole = weight.detach().clone() if hasattr(weight, "ds_id") else weight
    return note_origin(out, lambda x, weight: rms_norm(x, weight, eps, plus_one)[0], x, whole)


def _gated(activation: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def unit(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = gated_unit(gate, up, activation)
        return out

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        gated = unit(gate, up)
        if self.is_recomputed:
            note_origin(gated, unit, gate, up)
        out: torch.Tensor = self.down_proj(gated)
        return out

    return forward


NORMS = {"RMSNorm": _rms_norm, "RMSNorm + 1": _gemmas_rms_norm}
GATED_UNITS = {"SwiGLU": _gated("silu"), "GeGLU": _gated("gelu_tanh")}
FORWARDS = {**NORMS, **GATED_UNITS}
"""Maps a kind of layer to the function that replaces its `forward`."""


def recompute_in_backward(trunk: nn.Module) -> Counter[str]:
    """Lets backward recompute norms and gated units (`origins.py`). Returns the number of each kind."""
    found: Counter[str] = Counter()
    for module in trunk.modules():
        kind = getattr(module, "fused_kind", None)
        if kind in FORWARDS:
            module.is_recomputed = True  # type: ignore[assignment]
            found[kind] += 1
    return found


def _with_fused_rotary(forward: Any) -> FunctionType:
    """Returns the same attention code with our rotary embedding in its globals. No module is patched."""
    changed = {**forward.__globals__, ROTARY: _rotate_both}
    copied = FunctionType(
        forward.__code__, changed, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _rotate_both(
    q_BHLE: torch.Tensor, k_BHLE: torch.Tensor, cos_BLE: torch.Tensor, sin_BLE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of queries and keys `[B, H, L, E]` by the angles of `[B, L, E]` or `[1, L, E]`."""
    if not runs_on(q_BHLE.device):
        plain: tuple[torch.Tensor, torch.Tensor] = llama.apply_rotary_pos_emb(
            q_BHLE, k_BHLE, cos_BLE, sin_BLE
        )
        return plain
    n_rows, _, length, _ = q_BHLE.shape
    if n_rows == 1:  # a packed stream
        q_THE, k_THE = q_BHLE[0].transpose(0, 1), k_BHLE[0].transpose(0, 1)
        q_THE, k_THE = rotate(q_THE, k_THE, cos_BLE[0], sin_BLE[0])
        return q_THE.transpose(0, 1)[None], k_THE.transpose(0, 1)[None]
    cos_TE, sin_TE = (x.expand(n_rows, -1, -1).flatten(0, 1) for x in (cos_BLE, sin_BLE))
    q_THE, k_THE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHLE, k_BHLE))
    turned = rotate(q_THE, k_THE, cos_TE, sin_TE)
    q_BHLE, k_BHLE = (x_THE.view(n_rows, length, *x_THE.shape[1:]).transpose(1, 2) for x_THE in turned)
    return q_BHLE, k_BHLE
