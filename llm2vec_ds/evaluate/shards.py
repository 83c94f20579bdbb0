"""Runs one evaluation on all GPUs. Rank 0 asks for vectors, and every rank encodes its share of the texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from llm2vec_ds.distributed import (
    Ranks,
    agreed,
    broadcast_object,
    export_ranks,
    gather_rows,
    rank,
    ranks_from_environment,
    world_size,
)
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def process_group() -> Iterator[torch.device | None]:
    """Joins the ranks of a launcher, and yields this process's device.

    Without a launcher it yields None. The encoder then uses all GPUs.
    """
    ranks: Ranks = ranks_from_environment()
    if ranks.world_size == 1:
        yield None
        return
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    export_ranks(ranks)
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class RankEncoder:
    """An encoder as evaluation calls it. This rank encodes all texts."""

    encoder: Encoder
    micro_batch_tokens: int | None = None

    def encode(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """Returns the vectors of `texts` in order, `[N, D]` fp32, not normalised.

        Equal texts are encoded once. An empty text gets the zero vector, which is similar to no other. Some
        public data sets contain such texts.
        """
        distinct = list(dict.fromkeys(text for text in texts if text.strip()))
        place = {text: row for row, text in enumerate(distinct)}
        vectors = self._vectors(distinct, instruction)
        empty = np.zeros((1, vectors.shape[1]), dtype=np.float32)
        if len(blank := [text for text in texts if not text.strip()]):
            log.warning("%s of %s texts are empty: their vector is zero", len(blank), len(texts))
        rows = [place.get(text, len(distinct)) for text in texts]
        whole: np.ndarray = np.concatenate([vectors, empty])[rows]
        return whole

    def _vectors(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        if not texts:
            return np.empty((0, self.encoder.dimensions), dtype=np.float32)
        vectors: np.ndarray = self.encoder.encode(
            texts,
            instruction=instruction,
            micro_batch_tokens=self.micro_batch_tokens,
            show_progress=rank() == 0,
        )
        return vectors


@dataclass(frozen=True)
class ShardedEncoder(RankEncoder):
    """An encoder that is loaded on every rank. Rank 0 calls `encode`, the other ranks call `serve`."""

    def serve(self) -> None:
        """Encodes this rank's share of each request of rank 0, until rank 0 is done."""
        while (asked := broadcast_object(None)) is not None:
            with suppress(UserError):  # every rank gets the same error. Rank 0 reports it and calls `done`
                self._share(*asked)

    def done(self) -> None:
        """Lets the other ranks leave `serve`."""
        broadcast_object(None)

    def _vectors(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        broadcast_object((texts, instruction))
        return self._share(texts, instruction)

    def _share(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        """Encodes every W-th text on each of W ranks. Returns all vectors on every rank."""
        own = agreed(lambda: RankEncoder._vectors(self, texts[rank() :: world_size()], instruction))
        if world_size() == 1:
            return own
        # Gathered rows come rank by rank. Rank r has the texts r, r + W, r + 2W, …
        order = np.concatenate([np.arange(r, len(texts), world_size()) for r in range(world_size())])
        vectors = np.empty((len(texts), own.shape[1]), dtype=np.float32)
        vectors[order] = gather_rows(torch.from_numpy(own).to(self.encoder.device)).cpu().numpy()
        return vectors
