"""Files that a long job writes block by block. The job notes how far it is, and goes on there after a kill.

A block is on the disk when a function here returns. It is written to the file, not assigned to a memory map.
With a map, a full disk would be a bus error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.storage.durable import write_at


def create_array(file: Path, shape: tuple[int, int], dtype: Any) -> None:
    """Makes a .npy file of this shape. `fill_rows` fills it."""
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def fill_rows(file: Path, n_rows: int, first: int, block: np.ndarray) -> None:
    """Writes a block of rows into an array of `n_rows`, from row `first` on. Both have the same dtype."""
    bytes_after = (n_rows - first) * block[0].nbytes
    write_at(file, block.tobytes(), -bytes_after, os.SEEK_END)


def append_at(file: Path, n_bytes: int, content: bytes) -> int:
    """Writes `content` after the first `n_bytes` of a file. Returns the new size.

    Removes what lies behind them. A killed job may have written more than it noted.
    """
    os.truncate(file, n_bytes)
    return write_at(file, content, n_bytes)
