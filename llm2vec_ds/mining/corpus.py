"""Reads queries, their positives and a corpus into distinct texts in Arrow files, and numbers the pairs.

The Arrow files are memory-mapped.
"""

from __future__ import annotations

import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.data.prompts import Prompt
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.durable import move_file

TEXTS_PER_BLOCK = 1000
CHARACTERS_PER_BLOCK = 2**22
INDEX_FILE = "index.npz"
OWN_NEGATIVES = "pairs whose own negatives are left out"


@dataclass(frozen=True)
class DistinctTexts:
    """Texts numbered in the order of their first appearance. None of them is in memory."""

    rows: Any
    row_of_text: np.ndarray

    def __len__(self) -> int:
        return len(self.row_of_text)

    def __getitem__(self, texts: np.ndarray) -> list[str]:
        found: list[str] = self.rows[self.row_of_text[texts].tolist()]["text"]
        return found


@dataclass(frozen=True)
class Corpus:
    """Queries, documents, and the pairs between them.

    Attributes:
        pairs: `[n, 2]`, the number of the query, and the number of its positive among the documents.
        n_candidates: this many documents, from the first on, are the corpus. Positives outside it follow.
    """

    queries: DistinctTexts
    documents: DistinctTexts
    pairs: np.ndarray
    n_candidates: int


def write_corpus(
    folder: Path, pairs: Iterable[tuple[str, ...]], corpus: Iterable[str] | None, counts: Counter[str]
) -> None:
    """Writes the texts of pairs and corpus, and an index.

    It reads both once, and keeps 8 bytes per text in memory. The index is written last, so it shows that the
    rest is complete. Spaces around texts are removed. Blank texts, pairs with a blank part, and the hard
    negatives of pairs are left out. `counts` tells how many.

    Args:
        corpus: its texts. None: the positives are the corpus.

    Raises:
        UserError: there is no pair, or no text in the corpus.
    """
    pairs = iter(pairs)
    first = list(islice(pairs, 1))  # so that a mistake in the pairs shows before the corpus is read
    with _Writer(folder / "queries.arrow") as queries, _Writer(folder / "documents.arrow") as documents:
        for text in map(str.strip, corpus or ()):
            counts["blank"] += not text
            if text:
                documents.add(text)
        n_corpus = len(documents.hashes)
        if corpus is not None and not n_corpus:
            raise UserError("--corpus holds no text")
        for query, positive, *negatives in chain(first, pairs):
            counts[OWN_NEGATIVES] += bool(negatives)
            if not query.strip() or not positive.strip():
                counts["blank pairs"] += 1
                continue
            queries.add(query.strip())
            documents.add(positive.strip())
    if not queries.hashes:
        raise UserError("--pairs holds no pair")
    row_of_query, query_of_row = _distinct(queries.hashes)
    row_of_document, document_of_row = _distinct(documents.hashes)
    n_candidates = int(np.searchsorted(row_of_document, n_corpus)) if n_corpus else len(row_of_document)
    counts["duplicates"] += (n_corpus or len(documents.hashes)) - n_candidates
    new = folder / f"new-{INDEX_FILE}"
    np.savez(
        new,
        row_of_query=row_of_query,
        row_of_document=row_of_document,
        pairs=np.stack([query_of_row, document_of_row[n_corpus:]], axis=1),
        n_candidates=n_candidates,
    )
    move_file(new, folder / INDEX_FILE)


def load_corpus(folder: Path) -> Corpus:
    """Opens what `write_corpus` wrote. Only numbers are read into memory.

    Raises:
        UserError: a file is damaged.
    """
    import pyarrow as pa

    try:
        with np.load(folder / INDEX_FILE) as index:
            queries = _distinct_texts(folder / "queries.arrow", index["row_of_query"])
            documents = _distinct_texts(folder / "documents.arrow", index["row_of_document"])
            return Corpus(queries, documents, index["pairs"], int(index["n_candidates"]))
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zlib.error,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"the texts in {folder} are damaged ({cause}): remove it to start again") from None


def _distinct_texts(file: Path, row_of_text: np.ndarray) -> DistinctTexts:
    import datasets

    rows = datasets.Dataset.from_file(str(file))
    if len(rows) <= row_of_text.max():
        raise ValueError(f"{file.name} is cut off")
    return DistinctTexts(rows, row_of_text)


class _Writer:
    """Writes texts into an Arrow file, and keeps a hash of each in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.hashes = array("q")
        self._block: list[str] = []
        self._n_characters = 0
        self._schema = pa.schema([pa.field("text", pa.large_string())])
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_stream(self._sink, self._schema)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            self._flush()
        self._file.close()
        self._sink.close()

    def add(self, text: str) -> None:
        self.hashes.append(Prompt(None, text).hash())
        self._block.append(text)
        self._n_characters += len(text)
        if len(self._block) == TEXTS_PER_BLOCK or self._n_characters >= CHARACTERS_PER_BLOCK:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._file.write_batch(pa.RecordBatch.from_pydict({"text": self._block}, self._schema))
        self._block, self._n_characters = [], 0


def _distinct(hashes: array[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first row of each distinct text, in order, and for each row the number of its text."""
    # np.unique orders texts by hash. `number` gives them the order of their first appearance instead.
    _, first, inverse = np.unique(np.asarray(hashes), return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order], number[inverse]


@dataclass(frozen=True)
class KnownPositives:
    """For each query, the documents that are its positive in any pair."""

    documents: np.ndarray
    starts: np.ndarray

    def of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (place in `queries`, document) of each known positive."""
        # Query q has the documents starts[q] to starts[q + 1]. `within` counts 0, 1, … inside each range.
        begin, n = self.starts[queries], self.starts[queries + 1] - self.starts[queries]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return np.repeat(np.arange(len(queries)), n), self.documents[np.repeat(begin, n) + within]


def known_positives(pairs: np.ndarray) -> KnownPositives:
    """Sorts the pairs by query, for fast look-up."""
    order = np.argsort(pairs[:, 0], kind="stable")
    return KnownPositives(pairs[order, 1], np.searchsorted(pairs[order, 0], np.arange(pairs[:, 0].max() + 2)))
