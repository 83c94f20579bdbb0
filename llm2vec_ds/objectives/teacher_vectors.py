"""Another model's vectors on disk, found by text. They are made once, and every rank maps them into memory.

    texts ─► hashes.npy: one hash for each distinct text
          ─► vectors.npy grows block by block; progress.json says how far it is
          ─► the finished folder gets its name

The folder's name depends on the model, the prompt, and the texts with their instructions. For vectors that
`encode` wrote, only hashes and row numbers are made. The vectors stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2vec_ds.data.prompts import Prompt
from llm2vec_ds.data.sources import Source, find_source
from llm2vec_ds.data.text_rows import TextRows
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.teacher_model import Encode, load_teacher
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.recipe.sections import DataConfig
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.fingerprint import json_sha256, key_of, stat_of
from llm2vec_ds.storage.growing_files import create_array, fill_rows
from llm2vec_ds.storage.kept_folder import keep, read_kept
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.vectors.files import VECTOR_FORMATS, VectorNote, load_vectors, vector_files

log = logging.getLogger(__name__)

HASHES, ROWS = "hashes.npy", "rows.npy"
FORMAT_VERSION = 2
TEXTS_PER_BLOCK = 1024


@dataclass(frozen=True)
class VectorRequest:
    """Vectors that a recipe needs.

    Attributes:
        teacher: a model, or vectors that `encode` wrote.
        key: the recipe key that names the teacher.
        prompt: text that the model gets before each text.
        texts: yields (hash, text) of each text. Every call gives the same order.
        identity: values that change whenever the texts change.
        root: parent of the folders of vectors.
        n_trained: how many texts the run trains on at most, if that is known.
        layer: the layer of the model that gives the vectors. None: the model's own vectors.
    """

    teacher: str
    key: str
    prompt: str | None
    texts: Callable[[], Iterator[tuple[int, str]]]
    identity: list[Any]
    root: Path
    n_trained: int | None = None
    layer: int | None = None

    @property
    def folder(self) -> Path:
        """The folder that holds, or will hold, the vectors."""
        if _are_vectors(self.teacher):
            parts: list[Any] = ["vectors", Source(tuple(vector_files(self.teacher))).identity()]
        else:
            parts = ["model", self.teacher, _files_below(self.teacher), self.prompt]
            parts += [] if self.layer is None else [self.layer]
        return self.root / f"teacher-{key_of(*parts, self.identity, version=FORMAT_VERSION)}"


class TeacherVectors:
    """Looks up vectors `[texts, width]` by text hash."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if a file is damaged or missing."""
        kept = read_kept(folder)
        self.fingerprint = kept.fingerprint
        self._parts = [load_vectors(folder / name) for name in kept.files if name not in (HASHES, ROWS)]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        hashes, rows = (np.load(folder / name) for name in (HASHES, ROWS))
        order = np.argsort(hashes)
        self._hashes, self._rows = hashes[order], rows[order]
        self.width = int(self._parts[0].shape[1])

    def known(self, hashes: np.ndarray) -> np.ndarray:
        """Returns which of `hashes [N]` have a vector, bool."""
        return np.isin(hashes, self._hashes)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the vectors of all texts, `[N, width]` fp32 at a time."""
        for first in range(0, len(self._hashes), TEXTS_PER_BLOCK):
            yield self[self._hashes[first : first + TEXTS_PER_BLOCK]].numpy()

    def __getitem__(self, hashes: np.ndarray) -> torch.Tensor:
        """Returns the vectors `[N, width]` fp32 of `hashes [N]`, which must be known."""
        rows = self._rows[np.searchsorted(self._hashes, hashes)]
        found = np.empty((len(rows), self.width), dtype=np.float32)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            own = parts == part
            found[own] = self._parts[part][rows[own] - self._starts[part]]
        return torch.from_numpy(found)


def keep_vectors(wanted: VectorRequest) -> Path:
    """Returns the folder of the vectors. Makes it if it is missing or damaged.

    Raises:
        UserError: the model cannot be loaded, or its vectors cannot be read or written.
    """
    folder = wanted.folder
    keep(folder, f"vectors of {wanted.key}", lambda unfinished: _Making(wanted, unfinished).run())
    return folder


def limit_of(data: DataConfig) -> list[int]:
    """Returns what `data.max_texts` adds to the identity of texts.

    Without a limit this is nothing, so folders from before this key existed keep their names.
    """
    return [data.max_texts] if data.max_texts is not None else []


def _are_vectors(teacher: str) -> bool:
    path = Path(teacher)
    return path.suffix in VECTOR_FORMATS or (path.is_dir() and any(path.glob("shard-*")))


def _files_below(folder: str) -> list[Any]:
    """Names, sizes and modification times of all files in a model's folder; an empty list for a hub id."""
    files = (
        sorted(file for file in Path(folder).rglob("*") if file.is_file()) if Path(folder).is_dir() else []
    )
    return [stat_of(file, str(file.relative_to(folder))) for file in files]


class _Making:
    """Makes one folder. If it was interrupted, it continues after the last block of vectors on disk."""

    def __init__(self, wanted: VectorRequest, unfinished: Path) -> None:
        self.wanted, self.unfinished = wanted, unfinished
        self.hashes, self.rows = unfinished / HASHES, unfinished / ROWS
        self.vectors = unfinished / "vectors.npy"
        self.progress = unfinished / "progress.json"

    def run(self) -> list[str]:
        files = self._of_vectors() if _are_vectors(self.wanted.teacher) else self._of_model()
        self.progress.unlink(missing_ok=True)
        return [HASHES, ROWS, *files]

    def _of_vectors(self) -> list[str]:
        """Finds the wanted texts among those that the vectors' note names. Instructions are ignored."""
        teacher, key = self.wanted.teacher, self.wanted.key
        files = vector_files(teacher)
        note = VectorNote.read(files[0])
        if files[0].suffix != ".npy" or note is None or note.input == "-":
            raise UserError(
                f"{key} {teacher} does not say which texts its vectors belong to: write .npy files with "
                "llm2vec-ds encode, from a file of texts"
            )
        if self.wanted.prompt is not None:
            raise UserError(
                f"{key} {teacher} holds finished vectors, which a prompt cannot change: remove the prompt"
            )
        if self.wanted.layer is not None:
            raise UserError(
                f"{key} {teacher} holds finished vectors, which are of no layer: remove {key}_layer, or name "
                "the model"
            )
        source = find_source(note.input, f"the input of {teacher}")
        if note.input_key not in (None, json_sha256(source.identity())):
            raise UserError(
                f"{key} {teacher}: {note.input} has changed since it was encoded: encode it again"
            )
        rows = TextRows(source, note.text_column, 0, note.n_rows)
        bare = np.fromiter((-1 if text is None else _bare(text) for text in rows), dtype=np.int64)
        if len(bare) != note.n_rows:
            raise UserError(
                f"{key} {teacher}: {note.input} now has {len(bare)} texts, but had {note.n_rows} when it was "
                "encoded: encode it again"
            )
        known, row = np.unique(bare, return_index=True)
        wanted = np.fromiter(
            ((found, _bare(text)) for found, text in self.wanted.texts()), dtype=np.dtype((np.int64, 2))
        ).reshape(-1, 2)
        _, first = np.unique(wanted[:, 0], return_index=True)
        wanted = wanted[first]
        wanted = wanted[np.isin(wanted[:, 1], known)]
        np.save(self.hashes, wanted[:, 0])
        np.save(self.rows, row[np.searchsorted(known, wanted[:, 1])])
        return [str(file.resolve()) for file in files]

    def _of_model(self) -> list[str]:
        n_done = read_json(self.progress, int, f"remove {self.unfinished}") if self.progress.exists() else 0
        if not n_done:
            hashes = np.fromiter((found for found, _ in self.wanted.texts()), dtype=np.int64)
            _, first = np.unique(hashes, return_index=True)
            np.save(self.hashes, hashes[np.sort(first)])
            np.save(self.rows, np.arange(len(first)))
        hashes = np.load(self.hashes)
        if self.wanted.n_trained is not None and len(hashes) > self.wanted.n_trained:
            log.info(
                "%s encodes %s texts, and this run trains on %s at most: data.max_texts reads fewer",
                *(self.wanted.key, len(hashes), self.wanted.n_trained),
            )
        if n_done < len(hashes):
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
            wanted = self.wanted
            encode = load_teacher(
                wanted.teacher, wanted.key, wanted.prompt, device or torch.device("cpu"), wanted.layer
            )
            texts = islice(self._each_once(hashes), n_done, None)
            with Progress(wanted.key, "text", total=len(hashes), initial=n_done) as bar:
                self._encode(texts, encode, n_done, len(hashes), bar)
        return [self.vectors.name]

    def _each_once(self, hashes: np.ndarray) -> Iterator[str]:
        """Yields the text of each hash. The hashes are in the order in which their texts first appear."""
        next_of = iter(hashes.tolist())
        due = next(next_of, None)
        for found, text in self.wanted.texts():
            if found == due:
                yield text
                due = next(next_of, None)

    def _encode(self, texts: Iterator[str], encode: Encode, n_done: int, n_texts: int, bar: Any) -> None:
        for text in texts:
            vectors = encode([text, *islice(texts, TEXTS_PER_BLOCK - 1)])
            if not n_done:
                create_array(self.vectors, (n_texts, vectors.shape[1]), np.float32)
            if not np.isfinite(vectors).all():
                raise UserError(
                    f"{self.wanted.key} {self.wanted.teacher} gives vectors with a NaN or an infinity: "
                    "choose another model"
                )
            fill_rows(self.vectors, n_texts, n_done, vectors)
            n_done += len(vectors)
            replace_json(self.progress, n_done)
            bar.update(len(vectors))


def _bare(text: str) -> int:
    return Prompt(None, text).hash()
