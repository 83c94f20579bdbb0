"""Where kernels other than attention's run in Triton."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def runs_triton(device: torch.device) -> bool:
    """Is it a CUDA device of compute capability 8.0 or later, Triton installed, and not turned off by the
    environment (`LLM2VEC_TRITON=0`)?"""
    if os.environ.get("LLM2VEC_TRITON") == "0":
        return False
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
