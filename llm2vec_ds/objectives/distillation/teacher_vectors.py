"""The teacher's vectors on the disk, found by text: made once, memory-mapped by every rank.

    texts ─► hashes.npy ─► vectors.npy grows block by block, a note says how far ─► the folder's name

A folder is keyed by teacher, prompt, and the texts with their instruction. Of vectors that `encode` wrote
only the hashes are made; they are mapped where they lie.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llm2vec_ds.data.prepare import cache_root
from llm2vec_ds.data.prompts import Prompt
from llm2vec_ds.data.sources import Source, find_source, stream_texts
from llm2vec_ds.data.text_rows import TextRows
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.distillation.teacher_model import Encode, load_teacher
from llm2vec_ds.recipe.objectives import DistilConfig
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.storage.durable import replace_json, write_at
from llm2vec_ds.storage.fingerprint import key_of
from llm2vec_ds.storage.kept_folder import keep, read_kept
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.vectors.files import VECTOR_FORMATS, VectorNote, load_vectors, vector_files

log = logging.getLogger(__name__)

HASHES = "hashes.npy"
FORMAT_VERSION = 1
TEXTS_PER_BLOCK = 1024


class TeacherVectors:
    """Vectors `[texts, width]` by text hash; of a text that occurs twice, the first."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where a file is damaged or gone."""
        kept = read_kept(folder)
        self.fingerprint = kept.fingerprint
        self._parts = [load_vectors(folder / name) for name in kept.files if name != HASHES]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        hashes = np.load(folder / HASHES)
        self._hashes, self._rows = np.unique(hashes, return_index=True)
        self.width = int(self._parts[0].shape[1])

    def known(self, hashes: np.ndarray) -> np.ndarray:
        """Which of `hashes [N]` have a vector, bool."""
        return np.isin(hashes, self._hashes)

    def __getitem__(self, hashes: np.ndarray) -> torch.Tensor:
        """Vectors of known `hashes [N]`, `[N, width]` fp32."""
        rows = self._rows[np.searchsorted(self._hashes, hashes)]
        found = np.empty((len(rows), self.width), dtype=np.float32)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            own = parts == part
            found[own] = self._parts[part][rows[own] - self._starts[part]]
        return torch.from_numpy(found)


def prepare_teacher(recipe: Recipe, path: str | list[str]) -> Path:
    """The folder of the teacher's vectors for the texts of `path`; made if it is not there yet, or damaged.

    Raises:
        UserError: the teacher cannot be loaded, or its vectors cannot be read or written.
    """
    folder = teacher_folder(recipe, path)
    keep(folder, "the teacher's vectors", lambda unfinished: _Making(recipe, path, unfinished).run())
    return folder


def teacher_folder(recipe: Recipe, path: str | list[str]) -> Path:
    """Where the vectors for the texts of `path` are kept."""
    config, data = section_of(recipe), recipe.data
    root = Path(data.prepared_dir) if data.prepared_dir else cache_root() / "prepared"
    if _are_vectors(config.teacher):
        parts: list[Any] = ["vectors", Source(tuple(vector_files(config.teacher))).identity()]
    else:
        texts = [find_source(path).identity(), data.text_column]
        parts = ["model", config.teacher, _files_below(config.teacher), config.teacher_prompt, texts]
    return root / f"teacher-{key_of(*parts, data.instruction, version=FORMAT_VERSION)}"


def section_of(recipe: Recipe) -> DistilConfig:
    assert isinstance(recipe.objective, DistilConfig)
    return recipe.objective


def _are_vectors(teacher: str) -> bool:
    path = Path(teacher)
    return path.suffix in VECTOR_FORMATS or (path.is_dir() and any(path.glob("shard-*")))


def _files_below(folder: str) -> list[Any]:
    """Names, sizes and times of change of all files in a model's folder; nothing of a hub id."""
    files = (
        sorted(file for file in Path(folder).rglob("*") if file.is_file()) if Path(folder).is_dir() else []
    )
    return [[str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


class _Making:
    """One folder in the making."""

    def __init__(self, recipe: Recipe, path: str | list[str], unfinished: Path) -> None:
        self.recipe, self.path, self.unfinished = recipe, path, unfinished
        self.config = section_of(recipe)
        self.hashes = unfinished / HASHES
        self.vectors = unfinished / "vectors.npy"
        self.progress = unfinished / "progress.json"

    def run(self) -> list[str]:
        files = self._of_vectors() if _are_vectors(self.config.teacher) else self._of_model()
        self.progress.unlink(missing_ok=True)
        return [HASHES, *files]

    def _hash(self, text: str | None) -> int:
        return -1 if text is None else Prompt(self.recipe.data.instruction, text).hash()

    def _of_vectors(self) -> list[str]:
        """Hashes of the texts that the vectors' note names."""
        teacher = self.config.teacher
        files = vector_files(teacher)
        note = VectorNote.read(files[0])
        if files[0].suffix != ".npy" or note is None or note.input == "-":
            raise UserError(
                f"distil.teacher {teacher}: the texts of these vectors are not known: write .npy files with "
                "llm2vec-ds encode, from a file of texts"
            )
        rows = TextRows(find_source(note.input, f"the input of {teacher}"), note.text_column, 0, note.n_rows)
        hashes = np.fromiter(map(self._hash, rows), dtype=np.int64)
        if len(hashes) != note.n_rows:
            raise UserError(
                f"distil.teacher {teacher}: {note.input} has {len(hashes)} texts now, and had {note.n_rows}: "
                "encode it again"
            )
        np.save(self.hashes, hashes)
        return [str(file.resolve()) for file in files]

    def _of_model(self) -> list[str]:
        n_done = read_json(self.progress, int, f"remove {self.unfinished}") if self.progress.exists() else 0
        if not n_done:
            np.save(self.hashes, np.fromiter(map(self._hash, self._texts()), dtype=np.int64))
        n_texts = len(np.load(self.hashes))
        texts = islice(self._texts(), n_done, None)
        if n_done < n_texts:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
            encode = load_teacher(
                self.config.teacher, self.config.teacher_prompt, device or torch.device("cpu")
            )
            with tqdm(total=n_texts, initial=n_done, desc="teach", unit="text", disable=None) as bar:
                self._encode(texts, encode, n_done, n_texts, bar)
        return [self.vectors.name]

    def _texts(self) -> Iterator[str]:
        data = self.recipe.data
        texts = stream_texts(find_source(self.path), data.text_column, Counter(), whole=False)
        return (text for text in texts if text.strip())

    def _encode(self, texts: Iterator[str], encode: Encode, n_done: int, n_texts: int, bar: Any) -> None:
        for text in texts:
            vectors = encode([text, *islice(texts, TEXTS_PER_BLOCK - 1)])
            if not n_done:
                shape = (n_texts, vectors.shape[1])
                np.lib.format.open_memmap(self.vectors, mode="w+", dtype=np.float32, shape=shape)
            if not np.isfinite(vectors).all():
                raise UserError(f"distil.teacher {self.config.teacher} gives vectors that are not finite")
            # Written, not assigned through the map: there a full disk would be a bus error.
            place = -(n_texts - n_done) * vectors.shape[1] * vectors.itemsize
            write_at(self.vectors, vectors.tobytes(), place, os.SEEK_END)
            n_done += len(vectors)
            replace_json(self.progress, n_done)
            bar.update(len(vectors))
