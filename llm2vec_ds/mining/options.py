"""What `llm2vec-ds mine` is asked for."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm2vec_ds import __version__
from llm2vec_ds.data.sources import Source
from llm2vec_ds.errors import UserError

SAMPLINGS = ("top", "random")


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
    max_tokens_per_micro_batch: int = 4096
    seed: int = 42

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
        if self.sampling not in SAMPLINGS:
            raise UserError(f"--sampling {self.sampling!r} is unknown: choose {' or '.join(SAMPLINGS)}")

    def key(self, sources: list[Source], *more: object) -> str:
        """Changes with all that the output depends on; of a model's files with their sizes and times."""
        model = Path(self.model)
        files = sorted(model.iterdir()) if model.is_dir() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identities = [source.identity() for source in sources]
        parts = [__version__, asdict(self), identities, stats, torch.cuda.is_available(), *more]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
