"""The folder that `merge` writes: an encoder, and a note that says what it is a mixture of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.output_folder import check_new_folder

NOTE = "merge.json"


def check_merged_folder(output: Path, sources: Iterable[str | Path], overwrite: bool) -> None:
    """Checks that the folder may be written.

    Raises:
        UserError: it exists and `overwrite` is false. Or it holds a source, or files of others.
    """
    check_new_folder(output, f"--output {output}", map(Path, sources), overwrite)


def save_merged(
    encoder: Encoder,
    output: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    note: dict[str, Any] | None = None,
) -> None:
    """Writes the encoder, with the weights of `state_dict` if given, and then the note.

    Removes an earlier note first, so that no note describes another mixture.
    """
    (output / NOTE).unlink(missing_ok=True)
    encoder.save(output, state_dict)
    if note is not None:
        replace_json(output / NOTE, note)
