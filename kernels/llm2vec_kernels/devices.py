"""Decides for all kernels whether they run in Triton."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

SWITCH = "LLM2VEC_TRITON"
"""This environment variable turns Triton off if it is 0. It is read when a device is first used."""
LEAST_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result  # a compiler takes the answer as a constant, and does not trace this
def triton_refusal(device: torch.device, interpreter_too: bool = False) -> str | None:
    """Returns why kernels cannot run in Triton on this device, in words for a log. None: they can.

    Args:
        interpreter_too: accept other devices too if Triton interprets kernels (TRITON_INTERPRET=1).
    """
    return _refusal(device, interpreter_too)


def runs_triton(device: torch.device) -> bool:
    """Whether kernels run in Triton on this device."""
    return triton_refusal(device) is None


@lru_cache
def _refusal(device: torch.device, interpreter_too: bool) -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"Triton is turned off by {SWITCH}=0 in the environment"
    installed = find_spec("triton") is not None
    if device.type != "cuda":
        if interpreter_too and installed and _is_interpreted():
            return None
        return f"Triton needs a CUDA device, not {device}"
    if not installed:
        return "package triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"{device} has compute capability {major}.{minor}, below the 8.0 that the Triton kernels need"
    return None


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
