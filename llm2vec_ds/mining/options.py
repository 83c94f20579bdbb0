"""The options of `llm2vec-ds mine`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm2vec_ds.data.sources import Source
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.fingerprint import files_in, key_of

SAMPLINGS = ("top", "random")
FORMAT_VERSION = 3
"""Version of the format of unfinished work."""


@dataclass(frozen=True)
class MiningOptions:
    """The options of a search for hard negatives. See `llm2vec-ds mine --help`."""

    model: str
    pairs: str
    corpus: str | None = None
    query_column: str = "query"
    positive_column: str = "positive"
    corpus_column: str = "text"
    negatives: int = 5
    first_rank: int = 1
    last_rank: int = 50
    margin: float = 0.0
    ratio: float = 1.0
    reranker: str | None = None
    reranker_margin: float = 0.0
    reranker_ratio: float = 1.0
    reranker_batch_size: int = 32
    sampling: str = "top"
    query_instruction: str | None = None
    document_instruction: str | None = None
    micro_batch_tokens: int | None = None
    seed: int = 42
    bad_rows: str = "raise"

    def check(self) -> None:
        """Checks that the options are valid and do not contradict each other.

        Raises:
            UserError: ranks are reversed or too few, a margin is no number, a ratio is not in 0 to 1, a value
                is unknown, or an option needs a reranker and there is none.
        """
        for name in ("margin", "reranker_margin"):
            if not math.isfinite(value := getattr(self, name)):
                raise UserError(f"{_option(name)} {value} is not a finite number: give one such as 0.05")
        for name in ("ratio", "reranker_ratio"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(
                    f"{_option(name)} {value} must be above 0 and at most 1: give one such as 0.95"
                )
        if self.reranker is None and (self.reranker_margin or self.reranker_ratio != 1):
            name = "reranker_margin" if self.reranker_margin else "reranker_ratio"
            raise UserError(f"{_option(name)} does nothing without --reranker: give one, or leave it out")
        if self.first_rank > self.last_rank:
            raise UserError(
                f"--first-rank {self.first_rank} is above --last-rank {self.last_rank}: swap them"
            )
        n_ranks = self.last_rank - self.first_rank + 1
        if n_ranks < self.negatives:
            raise UserError(
                f"--negatives {self.negatives} is more than the {n_ranks} ranks from {self.first_rank} to "
                f"{self.last_rank}: raise --last-rank"
            )
        if self.bad_rows not in ("raise", "skip"):
            raise UserError(f"--bad-rows {self.bad_rows!r} is unknown: choose raise or skip")
        if self.sampling not in SAMPLINGS:
            raise UserError(f"--sampling {self.sampling!r} is unknown: choose {' or '.join(SAMPLINGS)}")

    def key(self, sources: list[Source], *more: object) -> str:
        """Returns a key of all that the output depends on. A model counts by size and time of its files."""
        values = asdict(self)
        # These do not change the output.
        for name in ("micro_batch_tokens", "bad_rows", "reranker_batch_size"):
            del values[name]
        identities = [source.identity() for source in sources]
        models = [self.model, *([self.reranker] if self.reranker else [])]
        files, on_cuda = [files_in(Path(model)) for model in models], torch.cuda.is_available()
        return key_of(values, identities, files, on_cuda, *more, version=FORMAT_VERSION)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
