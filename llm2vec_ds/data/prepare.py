"""Tokenises a source once into a memory-mapped Arrow file that every rank and every later run reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm2vec_ds.config import DataConfig
from llm2vec_ds.data.prompts import Prompt, TokenizedText, check_tokenizer, split, tokenize, truncate
from llm2vec_ds.data.sources import source_files, stream_texts
from llm2vec_ds.errors import UserError

TEXTS_PER_BLOCK = 1000


@dataclass(frozen=True)
class PreparedTexts:
    """Tokenised texts on disk. `fingerprint` is the SHA-256 of their content."""

    rows: Any
    fingerprint: str
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> list[TokenizedText]:
        block = self.rows[[int(i) for i in indices]]
        columns = (block[name] for name in ("input_ids", "pool_start", "pool_end", "text_hash"))
        return [TokenizedText(*values) for values in zip(*columns, strict=True)]


def cache_root() -> Path:
    """LLM2VEC_DS_CACHE, else `llm2vec-ds` in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("LLM2VEC_DS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2vec-ds"


def prepare(data: DataConfig, path: str | list[str], tokenizer: Any) -> Path:
    """Makes the folder of prepared texts if it is not there yet; returns it.

    One process does this while the others wait. The folder appears by a rename, so it is complete or
    absent. It is keyed by the files (path, size, time of change), the tokenizer and the settings.
    """
    check_tokenizer(tokenizer)
    files = source_files(path)
    root = Path(data.prepared_dir) if data.prepared_dir else cache_root() / "prepared"
    folder = root / _key(data, files, tokenizer)
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    unfinished = root / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        _write(data, files, tokenizer, unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run has just finished the same texts
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_prepared(folder: Path) -> PreparedTexts:
    """Opens a folder that `prepare` made; nothing but the lengths is read into memory."""
    import datasets

    manifest = json.loads((folder / "manifest.json").read_text())
    rows = datasets.Dataset.from_file(str(folder / "texts.arrow"))
    lengths = rows.data.column("n_tokens").to_numpy()
    return PreparedTexts(rows, manifest["fingerprint"], lengths)


def _write(data: DataConfig, files: list[Path], tokenizer: Any, folder: Path) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("pool_start", pa.int32()),
            ("pool_end", pa.int32()),
            ("text_hash", pa.int64()),
            ("n_tokens", pa.int32()),
        ]
    )
    counts = {"blank": 0, "shortened": 0, "rows": 0, "tokens": 0}
    with pa.OSFile(str(folder / "texts.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        texts = tqdm(stream_texts(files, data.text_column), desc="tokenise", unit=" texts", disable=None)
        for block in _blocks(_tokenized(data, texts, tokenizer, counts)):
            columns = {
                "input_ids": [list(t.input_ids) for t in block],
                "pool_start": [t.pool_start for t in block],
                "pool_end": [t.pool_end for t in block],
                "text_hash": [t.text_hash for t in block],
                "n_tokens": [len(t) for t in block],
            }
            counts["rows"] += len(block)
            counts["tokens"] += sum(columns["n_tokens"])
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
    if not counts["rows"]:
        raise UserError(f"{', '.join(map(str, files))}: no text in it, only blank lines")
    with (folder / "texts.arrow").open("rb") as written:
        fingerprint = hashlib.file_digest(written, "sha256").hexdigest()
    manifest = {"fingerprint": fingerprint, "files": [str(f) for f in files], **counts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _tokenized(
    data: DataConfig, texts: Iterable[str], tokenizer: Any, counts: dict[str, int]
) -> Iterator[TokenizedText]:
    for block in _blocks(texts):
        prompts = [Prompt(data.instruction, text) for text in block]
        for text in tokenize(tokenizer, prompts):
            if text.pool_start == text.pool_end:
                counts["blank"] += 1
                continue
            counts["shortened"] += len(text) > data.max_tokens
            if data.long_texts == "split":
                yield from split(text, data.max_tokens)
            else:
                yield truncate(text, data.max_tokens)


def _blocks(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(islice(items, TEXTS_PER_BLOCK)):
        yield block


def _key(data: DataConfig, files: list[Path], tokenizer: Any) -> str:
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    settings = data.model_dump(exclude={"path", "held_out_path", "prepared_dir"})
    parts = json.dumps([stats, settings, tokenizer.backend_tokenizer.to_str()], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:24]
