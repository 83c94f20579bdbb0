"""Where Triton's kernels run."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def runs_triton(device: torch.device) -> bool:
    """Is it a CUDA device of compute capability 8.0 or later, and Triton installed?"""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
