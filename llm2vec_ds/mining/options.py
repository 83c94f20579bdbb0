"""What `llm2vec-ds mine` is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm2vec_ds.data.sources import Source
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.fingerprint import files_in, key_of

SAMPLINGS = ("top", "random")
FORMAT_VERSION = 2
"""Of unfinished work."""


@dataclass(frozen=True)
class MiningOptions:
    """What is mined, and from where: see `llm2vec-ds mine --help`."""

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
    sampling: str = "top"
    query_instruction: str | None = None
    document_instruction: str | None = None
    micro_batch_tokens: int = 4096
    seed: int = 42
    bad_rows: str = "raise"

    def check(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            UserError: ranks that are reversed or too few, a margin that is no number, or an unknown sampling.
        """
        if not math.isfinite(self.margin):
            raise UserError(f"--margin {self.margin} is not a finite number: give one such as 0.05")
        if self.first_rank > self.last_rank:
            raise UserError(f"--first-rank {self.first_rank} is over --last-rank {self.last_rank}: swap them")
        n_ranks = self.last_rank - self.first_rank + 1
        if n_ranks < self.negatives:
            raise UserError(
                f"--negatives {self.negatives} is over the {n_ranks} ranks from {self.first_rank} to "
                f"{self.last_rank}: raise --last-rank"
            )
        if self.bad_rows not in ("raise", "skip"):
            raise UserError(f"--bad-rows {self.bad_rows!r} is unknown: choose raise or skip")
        if self.sampling not in SAMPLINGS:
            raise UserError(f"--sampling {self.sampling!r} is unknown: choose {' or '.join(SAMPLINGS)}")

    def key(self, sources: list[Source], *more: object) -> str:
        """Changes with all that the output depends on; of a model's files with their sizes and times."""
        values = asdict(self)
        for name in ("micro_batch_tokens", "bad_rows"):  # they shape nothing that is written
            del values[name]
        identities = [source.identity() for source in sources]
        files, on_cuda = files_in(Path(self.model)), torch.cuda.is_available()
        return key_of(values, identities, files, on_cuda, *more, version=FORMAT_VERSION)
