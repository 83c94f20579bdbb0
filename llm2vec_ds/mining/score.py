"""Scores the documents of each query with a reranker, and writes pairs with scores into a new file.

Rows are read, scored and appended block by block, and a note says how far. So a killed run continues where it
stopped, and nothing needs to fit in memory.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from llm2vec_ds.data.scored_pairs import ScoredRow, stream_scored_rows
from llm2vec_ds.data.sources import Source, find_source
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.mining.reranker import MAX_TOKENS, Reranker
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.recipe.sections import PairsConfig
from llm2vec_ds.storage.durable import move_file, replace_json
from llm2vec_ds.storage.fingerprint import files_in, key_of
from llm2vec_ds.storage.growing_files import append_at
from llm2vec_ds.storage.output_folder import check_new_file, check_reads_no_output
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.storage.work_folder import work_folder
from llm2vec_ds.vectors.files import Shard

log = logging.getLogger(__name__)

ROWS_PER_BLOCK = 256
SCORES = "scores"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ScoreOptions:
    """The options of scoring. See `llm2vec-ds score --help`."""

    reranker: str
    pairs: str
    query_column: str = "query"
    positive_column: str = "positive"
    negative_column: str = "negative"
    max_tokens: int = MAX_TOKENS
    batch_size: int = 32

    def key(self, source: Source, shard: Shard) -> str:
        values = asdict(self)
        del values["batch_size"]  # it changes only speed and memory
        return key_of(
            values, source.identity(), files_in(Path(self.reranker)), asdict(shard), version=FORMAT_VERSION
        )


@dataclass(frozen=True)
class _Progress:
    n_rows: int = 0
    n_bytes: int = 0


def score(options: ScoreOptions, output: Path, shard: Shard | None = None, *, overwrite: bool = False) -> int:
    """Writes `output`: for each row of pairs a JSON line with its texts and `scores`, the positive's first.

    Args:
        shard: score only this part of the rows. None: all.

    Returns:
        How many rows the output holds.

    Raises:
        UserError: an option, the source or the reranker is wrong, or the output exists or cannot be written.
    """
    shard = shard or Shard()
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output} must end in .jsonl")
    check_new_file(output, f"--output {output}", overwrite)
    source = find_source(options.pairs, "PAIRS")
    check_reads_no_output([output], source.files, f"--output {output}")
    folder = output.with_name(f".{output.name}.scoring")
    with writing(f"--output {output}"), work_folder(folder, options.key(source, shard)):
        n_rows = _Scoring(options, source, folder).run(shard)
        move_file(folder / "rows.jsonl", output)
        shutil.rmtree(folder)
    log.info("%s: %s rows", output, n_rows)
    return n_rows


class _Scoring:
    """Works in one work folder. It does only what is missing."""

    def __init__(self, options: ScoreOptions, source: Source, folder: Path) -> None:
        self.options, self.source = options, source
        self.rows, self.note = folder / "rows.jsonl", folder / "progress.json"
        self.progress = _Progress()
        if self.note.exists() and self.rows.exists():
            self.progress = read_json(self.note, _Progress, f"remove {folder} to start again")
        self.rows.touch()
        if self.rows.stat().st_size < self.progress.n_bytes:
            raise UserError(f"{self.rows} is damaged (it is cut off): remove {folder} to start again")

    def run(self, shard: Shard) -> int:
        n_all = sum(1 for _ in self._stream())
        if not n_all:
            raise UserError(f"{self.options.pairs} is empty")
        start, stop = shard.rows(n_all)
        n_rows = stop - start
        rows = islice(self._stream(), start + self.progress.n_rows, stop)
        if self.progress.n_rows < n_rows:
            options = self.options
            reranker = Reranker(
                options.reranker,
                max_tokens=options.max_tokens,
                batch_size=options.batch_size,
                batch_key="--batch-size",
            )
            n_done = self.progress.n_rows
            with Progress("score", "row", total=n_rows, initial=n_done) as bar:
                while block := list(islice(rows, ROWS_PER_BLOCK)):
                    self._append(block, self._scores(reranker, block))
                    bar.update(len(block))
        return n_rows

    def _stream(self) -> Iterator[ScoredRow]:
        options = self.options
        columns = PairsConfig(
            query_column=options.query_column,
            positive_column=options.positive_column,
            negative_column=options.negative_column,
        )
        return stream_scored_rows(self.source, columns, None, "")

    def _scores(self, reranker: Reranker, block: list[ScoredRow]) -> list[list[float]]:
        scores = iter(
            reranker([(row.query, document) for row in block for document in row.documents]).tolist()
        )
        listed = [list(islice(scores, len(row.documents))) for row in block]
        for row, own in zip(block, listed, strict=True):
            if not all(map(math.isfinite, own)):
                raise UserError(
                    f"{row.place}: --reranker {self.options.reranker} gives no finite score: use another"
                )
        return listed

    def _append(self, block: list[ScoredRow], scores: list[list[float]]) -> None:
        options = self.options
        lines = []
        for row, own in zip(block, scores, strict=True):
            texts = {options.query_column: row.query, options.positive_column: row.positive}
            values = {**texts, options.negative_column: row.negatives, SCORES: own}
            lines.append(json.dumps(values, ensure_ascii=False) + "\n")
        end = append_at(self.rows, self.progress.n_bytes, "".join(lines).encode())
        self.progress = _Progress(self.progress.n_rows + len(block), end)
        replace_json(self.note, asdict(self.progress))
