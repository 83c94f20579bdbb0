"""Reads the tokenised texts that `prepare` wrote. Only their lengths are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.data.prepared_folder import read_manifest
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class PreparedTexts:
    """Tokenised texts on disk.

    Attributes:
        fingerprint: SHA-256 of their content.
    """

    rows: Any
    fingerprint: str
    lengths: np.ndarray
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> list[TokenizedText]:
        block = self.rows[[int(i) for i in indices]]
        columns = (block[name] for name in ("input_ids", "pool_start", "pool_end", "text_hash"))
        return [TokenizedText(*values) for values in zip(*columns, strict=True)]


def load_prepared(folder: Path) -> PreparedTexts:
    """Opens a folder that `prepare` made. Only the lengths are read into memory.

    Raises:
        UserError: it is damaged, and this shows without reading all of it.
    """
    import pyarrow as pa

    manifest = read_manifest(folder)
    try:
        rows = _memory_mapped(folder, manifest.parts)
        lengths = rows.data.column("n_tokens").to_numpy()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"prepared texts in {folder} are damaged ({cause}): prepare them again") from None
    return PreparedTexts(rows, manifest.fingerprint, lengths, manifest.counts)


def _memory_mapped(folder: Path, parts: list[str]) -> Any:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(folder / name)) for name in parts])
