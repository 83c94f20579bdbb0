"""Mines hard negatives: for each pair, texts of a corpus that the model finds near, by exact search.

    pairs, corpus ─► distinct texts (Arrow) ─► vectors (.npy) ─► ranks of each pair ─► output

All files but the output are in a work folder beside it. They grow block by block, and a note says how far. So
a killed run continues where it stopped. Texts and vectors need not fit in memory.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from llm2vec_ds.data.sources import Source, find_source, stream_pairs, stream_texts
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.passes import lower_pass
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.mining.corpus import (
    OWN_NEGATIVES,
    Corpus,
    DistinctTexts,
    known_positives,
    load_corpus,
    write_corpus,
)
from llm2vec_ds.mining.exact_search import ROUNDING, Exclusions, Ranked, best_rows
from llm2vec_ds.mining.options import MiningOptions
from llm2vec_ds.mining.reranker import Reranker
from llm2vec_ds.process.full_memory import enough_memory
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.recipe.sections import PairsConfig
from llm2vec_ds.storage.durable import move_file, replace_text
from llm2vec_ds.storage.growing_files import append_at, create_array, fill_rows
from llm2vec_ds.storage.output_folder import check_new_file, check_reads_no_output
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.storage.work_folder import work_folder

log = logging.getLogger(__name__)

TEXTS_PER_BLOCK = 1024
PAIRS_PER_BLOCK = 2048
RERANKED_PAIRS_PER_BLOCK = 128
"""Block size with a reranker. It is smaller, because a reranker reads the texts of all ranks and is slow."""
DOCUMENTS_PER_TILE = 16384
OTHERS, NEAR, EARLIER, RERANKED = (
    "skipped: another positive of the query",
    "skipped: as near as the positive",
    "skipped: before --first-rank",
    "skipped: as good as the positive for the reranker",
)
Score = TypeVar("Score", float, torch.Tensor)


def mine(options: MiningOptions, output: Path, *, overwrite: bool = False) -> Counter[str]:
    """Writes `output`: for each pair a JSON line with `query`, `positive` and `negative`, a list.

    A candidate is a text of the corpus that is no known positive of the query in any pair. Its cosine is also
    below the positive's by ratio and margin (`below`). Ranks count only candidates, from 1. In the rank
    range, a reranker leaves out candidates whose score is not below the positive's.

    Returns:
        Counts of pairs, queries and candidates, of what was left out and why, and of pairs with too few
        negatives or none.

    Raises:
        UserError: an option or source is wrong, or the output exists or cannot be written.
    """
    options.check()
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output} must end in .jsonl")
    check_new_file(output, f"--output {output}", overwrite)
    sources = [find_source(options.pairs, "--pairs")]
    if options.corpus is not None:
        sources.append(find_source(options.corpus, "--corpus"))
    check_reads_no_output(
        [output], [file for source in sources for file in source.files], f"--output {output}"
    )
    folder = output.with_name(f".{output.name}.mining")
    key = options.key(sources, TEXTS_PER_BLOCK, _pairs_per_block(options), DOCUMENTS_PER_TILE)
    with writing(f"--output {output}"), work_folder(folder, key):
        mining = _Mining(options, sources, folder)
        mining.run()
        move_file(mining.found, output)
        shutil.rmtree(folder)
    counts = mining.counts()
    log.info("%s: %s", output, ", ".join(f"{n} {name}" for name, n in counts.items() if n))
    return counts


@dataclass
class _Progress:
    """How far the finished blocks go.

    Attributes:
        n_encoded: encoded texts, by kind of text.
        n_searched: searched pairs.
        n_bytes: size of their lines.
        n_few: pairs with too few negatives.
        n_none: pairs without negatives.
        counts: what was read and left out.
        skipped: which texts were no negatives, and why.
    """

    n_encoded: dict[str, int] = field(default_factory=lambda: {"queries": 0, "documents": 0})
    n_searched: int = 0
    n_bytes: int = 0
    n_few: int = 0
    n_none: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class _Mining:
    """Works in one work folder. Each step does only what is missing."""

    def __init__(self, options: MiningOptions, sources: list[Source], folder: Path) -> None:
        self.options = options
        self.sources = sources
        self.folder = folder
        self.note = folder / "progress.json"
        self.found = folder / "found.jsonl"
        self.progress = _Progress()
        if self.note.exists():
            self.progress = read_json(self.note, _Progress, f"remove {folder} to start again")
        if not self.found.exists():  # it was moved to the output, which must be made again
            self.progress = replace(self.progress, n_searched=0, n_bytes=0, n_few=0, n_none=0, skipped={})
        elif self.found.stat().st_size < self.progress.n_bytes:
            raise UserError(f"{self.found} is damaged (it is cut off): remove {folder} to start again")

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder. It is loaded only if something is left to encode."""
        return Encoder.from_pretrained(self.options.model)

    @cached_property
    def reranker(self) -> Reranker | None:
        options = self.options
        if options.reranker is None:
            return None
        return Reranker(
            options.reranker, batch_size=options.reranker_batch_size, batch_key="--reranker-batch-size"
        )

    def run(self) -> None:
        if not self.progress.counts:
            try:
                self._read_sources()
            except BaseException:  # there is nothing yet that the next run could use
                shutil.rmtree(self.folder)
                raise
        corpus = load_corpus(self.folder)
        queries = self._encode("queries", corpus.queries, self.options.query_instruction)
        documents = self._encode("documents", corpus.documents, self.options.document_instruction)
        self._search(corpus, queries, documents)

    def counts(self) -> Counter[str]:
        few = f"pairs with fewer than {self.options.negatives} negatives"
        pairs = {few: self.progress.n_few, "pairs with none": self.progress.n_none}
        return Counter(self.progress.counts | self.progress.skipped | pairs)

    def _read_sources(self) -> None:
        # The models come first, so that a wrong one shows before the long reading.
        bytes_per_text = 4 * self.encoder.trunk.config.hidden_size
        if self.reranker is not None:
            n_texts = 2 + self.options.last_rank - self.options.first_rank
            log.info("--reranker %s reads up to %s texts per pair", self.options.reranker, n_texts)
        options, counts = self.options, Counter[str]()
        columns = PairsConfig(
            query_column=options.query_column, positive_column=options.positive_column, max_negatives=1
        )
        keys = ["--query-column", "--positive-column"]
        pairs = stream_pairs(self.sources[0], columns, counts, keys, options.bad_rows)
        texts = None
        if options.corpus is not None:
            key = "--corpus-column"
            texts = stream_texts(
                self.sources[1],
                options.corpus_column,
                counts,
                whole=False,
                key=key,
                bad_rows=options.bad_rows,
            )
        log.info("reading %s", " and ".join(map(str, self.sources)))
        write_corpus(self.folder, pairs, texts, counts)
        if counts[OWN_NEGATIVES]:
            log.warning(
                "%s: %s pair(s) have hard negatives of their own, which the output leaves out: to keep them, "
                "train on both files",
                *(self.sources[0], counts[OWN_NEGATIVES]),
            )
        corpus = load_corpus(self.folder)
        n_queries, n_documents = len(corpus.queries), len(corpus.documents)
        sizes = {"pairs": len(corpus.pairs), "queries": n_queries, "candidates": corpus.n_candidates}
        self.progress.counts = sizes | counts
        mib = bytes_per_text * (n_queries + n_documents) / 2**20
        log.info("%s: vectors will take %.1f MiB", self.folder, mib)
        self._write_note()

    def _encode(self, kind: str, texts: DistinctTexts, instruction: str | None) -> np.ndarray:
        """Encodes the texts that are left. Returns normalised vectors, `[texts, D]` fp32, memory-mapped."""
        path, n_done = self.folder / f"{kind}.npy", self.progress.n_encoded[kind]
        if not n_done:
            create_array(path, (len(texts), self.encoder.trunk.config.hidden_size), np.float32)
        self._mapped(path, len(texts))  # checks that blocks of an earlier run are not damaged
        with Progress(f"encode {kind}", "text", total=len(texts), initial=n_done) as bar:
            for block in _blocks(n_done, len(texts), TEXTS_PER_BLOCK):
                fill_rows(path, len(texts), block[0], self._vectors(texts[block], instruction))
                self.progress.n_encoded[kind] = int(block[-1]) + 1
                self._write_note()
                bar.update(len(block))
        return self._mapped(path, len(texts))

    def _mapped(self, path: Path, n_texts: int) -> np.ndarray:
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r")
            if mapped.dtype != np.float32 or mapped.ndim != 2 or len(mapped) != n_texts:
                raise ValueError(f"it does not hold {n_texts} vectors")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): remove {self.folder} to start again") from None
        return mapped

    def _vectors(self, texts: list[str], instruction: str | None) -> np.ndarray:
        budget = self.options.micro_batch_tokens
        with enough_memory(lower_pass(budget)):
            return self.encoder.encode(
                texts, instruction=instruction, normalize=True, micro_batch_tokens=budget
            )

    def _search(self, corpus: Corpus, queries: np.ndarray, documents: np.ndarray) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        known = known_positives(corpus.pairs)
        n_done, n_pairs = self.progress.n_searched, len(corpus.pairs)
        self.found.touch()
        with Progress("search", "pair", total=n_pairs, initial=n_done) as bar:
            for block in _blocks(n_done, n_pairs, _pairs_per_block(self.options)):
                query, positive = corpus.pairs[block].T
                query_BD = torch.from_numpy(queries[query]).to(device)
                positive_BD = torch.from_numpy(documents[positive]).to(device)
                place, document = known.of(query)
                exclusions = Exclusions(
                    below((query_BD * positive_BD).sum(dim=1), self.options.ratio, self.options.margin),
                    *(torch.from_numpy(found).to(device) for found in (place, document)),
                )
                candidates_ND = documents[: corpus.n_candidates]
                last_rank = min(self.options.last_rank, corpus.n_candidates)
                ranked = best_rows(
                    query_BD, candidates_ND, last_rank, exclusions, rows_per_tile=DOCUMENTS_PER_TILE
                )
                others = (document < corpus.n_candidates) & (document != positive[place])
                skipped = {OTHERS: int(np.count_nonzero(others)), NEAR: int(ranked.n_near_B.sum())}
                self._write_found(corpus, block, self._in_range(corpus, block, ranked, skipped), skipped)
                bar.update(len(block))

    def _in_range(
        self, corpus: Corpus, block: np.ndarray, ranked: Ranked, skipped: dict[str, int]
    ) -> list[np.ndarray]:
        """Returns each pair's candidates in the rank range that the reranker, if any, keeps.

        Adds the others to `skipped`.
        """
        first = self.options.first_rank - 1
        of_ranks = [rows[rows >= 0] for rows in ranked.rows_BK]
        skipped[EARLIER] = sum(min(first, len(rows)) for rows in of_ranks)
        in_range = [rows[first:] for rows in of_ranks]
        if self.reranker is None:
            return in_range
        kept = self._below_positive(corpus, block, in_range, self.reranker)
        skipped[RERANKED] = sum(map(len, in_range)) - sum(map(len, kept))
        return kept

    def _below_positive(
        self, corpus: Corpus, block: np.ndarray, rows: list[np.ndarray], reranker: Reranker
    ) -> list[np.ndarray]:
        """Returns the documents of each pair that the reranker also scores below the positive."""
        query, positive = corpus.pairs[block].T
        n_of_pair = [1 + len(own) for own in rows]
        documents = np.concatenate([[p, *own] for p, own in zip(positive, rows, strict=True)])
        texts = zip(
            corpus.queries[np.repeat(query, n_of_pair)],
            corpus.documents[documents.astype(np.int64)],
            strict=True,
        )
        found = reranker(list(texts))
        if not np.isfinite(found).all():
            raise UserError(
                f"--reranker {self.options.reranker} gives scores that are not finite: use another"
            )
        scores = np.split(1 / (1 + np.exp(-found)), np.cumsum(n_of_pair)[:-1])
        ratio, margin = self.options.reranker_ratio, self.options.reranker_margin
        return [
            own[score[1:] < below(score[0], ratio, margin) - ROUNDING]
            for own, score in zip(rows, scores, strict=True)
        ]

    def _write_found(
        self, corpus: Corpus, block: np.ndarray, in_range: list[np.ndarray], skipped: dict[str, int]
    ) -> None:
        """Writes the lines of a block of pairs."""
        chosen = [self._choose(int(pair), rows) for pair, rows in zip(block, in_range, strict=True)]
        query, positive = corpus.pairs[block].T
        negatives = iter(corpus.documents[np.concatenate(chosen)])
        lines = [
            {"query": q, "positive": p, "negative": list(islice(negatives, len(rows)))}
            for q, p, rows in zip(corpus.queries[query], corpus.documents[positive], chosen, strict=True)
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self.progress.n_bytes = append_at(self.found, self.progress.n_bytes, content)
        n_found = np.array([len(rows) for rows in chosen])
        self.progress.n_few += int(np.count_nonzero(n_found < self.options.negatives))
        self.progress.n_none += int(np.count_nonzero(n_found == 0))
        self.progress.n_searched = int(block[-1]) + 1
        self.progress.skipped = dict(Counter(self.progress.skipped) + Counter(skipped))
        self._write_note()

    def _choose(self, pair: int, in_range: np.ndarray) -> np.ndarray:
        """Returns at most `negatives` candidates: the first ones, or random ones, drawn by (seed, pair)."""
        n = self.options.negatives
        if self.options.sampling == "random":
            seeds = np.random.SeedSequence([self.options.seed, pair])
            in_range = np.random.Generator(np.random.Philox(seeds)).permutation(in_range)
        return in_range[:n]

    def _write_note(self) -> None:
        replace_text(self.note, json.dumps(asdict(self.progress)))


def below(score: Score, ratio: float, margin: float) -> Score:
    """Returns the limit for a negative's score from the positive's: score − (1 − ratio) · |score| − margin.

    For a score above 0 this is ratio · score − margin. For any score, the limit is never above the score. A
    ratio of 0.95 is TopK-PercPos of NV-Retriever (Moreira et al., 2024, arXiv 2407.15831).
    """
    return score - (1 - ratio) * abs(score) - margin


def _pairs_per_block(options: MiningOptions) -> int:
    return RERANKED_PAIRS_PER_BLOCK if options.reranker else PAIRS_PER_BLOCK


def _blocks(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """Yields consecutive numbers, `size` at a time."""
    return (np.arange(first, min(first + size, stop)) for first in range(start, stop, size))
