"""Rounds document vectors as storage in fewer bytes does (`vectors/quantized.py`), with a gradient.

Shape legend: N texts, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from llm2vec_ds.recipe.objectives import Rounding

Form = Rounding | Literal["float32"]


def rounded(unit_ND: torch.Tensor, form: Form) -> torch.Tensor:
    """Returns vectors `[N, D]` of length 1 in the direction of the stored row.

    The gradient ignores the rounding (straight-through estimator: Bengio et al., 2013, arXiv 1308.3432).
    """
    if form == "float32":
        return unit_ND
    exact_ND = unit_ND.detach()
    if form == "int8":
        largest_N1 = exact_ND.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        row_ND = (127 * exact_ND / largest_N1).round()
    else:
        row_ND = torch.where(exact_ND > 0, 1.0, -1.0)
    return unit_ND + (F.normalize(row_ND, dim=-1) - exact_ND)
