"""Identifies a model by its weights, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm2vec_ds.model.peft_adapters import ModelSource, resolve

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 2**16


def model_fingerprint(path: str) -> str | None:
    """Returns the SHA-256 of a model's configuration and of blocks spread over its weight files.

    None: the model is on the hub, and its weights are not on this machine.

    Training changes practically every weight. So sampled blocks (4 MiB a file) tell models apart as well as
    all bytes would. Reading everything could mean a hundred gigabytes at each start.
    """
    digest = hashlib.sha256()
    stack = resolve(path) if Path(path).is_dir() else ModelSource(path, ())
    files = [file for place in (stack.base, *map(str, stack.adapters)) for file in _model_files(place)]
    if not any(file.suffix != ".json" for file in files) and not Path(path).is_dir():
        return None
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _model_files(path: str) -> list[Path]:
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    patterns = ("config.json", "*.safetensors", "*.bin", "*.gguf")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def _blocks(file: Path) -> list[bytes]:
    size = file.stat().st_size
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return [file.read_bytes()]
    blocks = []
    with file.open("rb") as opened:
        for number in range(SAMPLED_BLOCKS):
            opened.seek((size - BLOCK_BYTES) * number // (SAMPLED_BLOCKS - 1))
            blocks.append(opened.read(BLOCK_BYTES))
    return blocks
