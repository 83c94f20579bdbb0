"""Stores vectors in fewer bytes, for search by cosine.

A cosine does not depend on a row's scale, so no row stores its scale.

int8     round(127 · x / max |x|), D bytes. A row of zeros stands for a text without a vector
binary   the sign of each component, D / 8 bytes. The first component is in the highest bit
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Stored = Literal["float32", "int8", "binary"]
STORED: tuple[Stored, ...] = get_args(Stored)
DTYPES: dict[Stored, type[np.generic]] = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}


def stored_width(dimensions: int, stored: Stored) -> int:
    """Returns how many columns a stored row has."""
    return -(-dimensions // 8) if stored == "binary" else dimensions


def quantize(vectors_ND: np.ndarray, stored: Stored) -> np.ndarray:
    """Converts fp32 `[N, D]` to `[N, stored_width]`.

    Raises:
        ValueError: there is a row of NaN, which `binary` cannot store.
    """
    if stored == "float32":
        return vectors_ND.astype(np.float32, copy=False)
    missing_N = np.isnan(vectors_ND).any(axis=1)
    if stored == "binary":
        if missing_N.any():
            raise ValueError("binary cannot mark a text without vector")
        return np.packbits(vectors_ND > 0, axis=1)
    largest_N1 = np.abs(vectors_ND).max(axis=1, keepdims=True, initial=1e-30)
    scaled_ND = np.where(missing_N[:, None], 0.0, 127 * vectors_ND / largest_N1)
    return np.rint(scaled_ND).astype(np.int8)


def dequantize(rows: np.ndarray, stored: Stored, dimensions: int) -> np.ndarray:
    """Converts back to fp32 `[N, D]`. The length of each row is lost.

    `binary` gives ±1. A text without a vector gives NaN.
    """
    if stored == "float32":
        return rows
    if stored == "binary":
        return np.unpackbits(rows, axis=1, count=dimensions).astype(np.float32) * 2 - 1
    values_ND = rows.astype(np.float32)
    values_ND[~rows.any(axis=1)] = np.nan
    return values_ND


def hamming(rows: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Counts the components with different signs between each of `rows [N, D/8]` and `bits [D/8]`, `[N]`."""
    distance_N: np.ndarray = np.bitwise_count(rows ^ bits).sum(axis=1, dtype=np.int64)
    return distance_N
