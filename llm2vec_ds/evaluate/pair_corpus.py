"""Turns a file of training pairs into a retrieval task: each query against the documents of all queries."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from llm2vec_ds.data.sources import find_source, stream_pairs
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.beir import Beir
from llm2vec_ds.recipe.sections import PairsConfig

log = logging.getLogger(__name__)

ALL = 2**20


def corpus_of_pairs(file: Path) -> Beir:
    """Reads a file of pairs as a retrieval data set.

    The documents are all positives and hard negatives, each text once. A query's positives are relevant.
    A pair with a blank query or positive is left out.

    Raises:
        UserError: a row lacks the columns `query` and `positive`, or the file cannot be read.
    """
    counts: Counter[str] = Counter()
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for query, positive, *negatives in stream_pairs(
        find_source(str(file), "--task"), PairsConfig(max_negatives=ALL), counts, keys=("", "", "")
    ):
        if not query.strip() or not positive.strip():
            counts["blank"] += 1
            continue
        own = queries.setdefault(query, f"q{len(queries)}")
        for document in (positive, *negatives):
            documents.setdefault(document, f"d{len(documents)}")
        relevant.setdefault(own, {})[documents[positive]] = 1
    if not relevant:
        raise UserError(f"--task retrieval:{file}: no row has a query and a positive")
    if counts["blank"]:
        log.warning("%s: %s pair(s) with a blank query or positive are left out", file, counts["blank"])
    corpus = {own: ("", text) for text, own in documents.items()}
    return Beir(corpus, {own: text for text, own in queries.items()}, relevant)
