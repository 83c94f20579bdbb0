"""Triton's interpreter as exact as a GPU where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def round_bf16_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 to bf16 towards zero, twice the error of the rounding that GPUs do."""
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
