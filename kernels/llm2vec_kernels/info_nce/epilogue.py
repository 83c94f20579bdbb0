"""The passes over a tile of scores after its matrix product, in PyTorch.

Shape legend: N documents, B queries of one tile.
"""

from __future__ import annotations

from typing import Protocol

import torch

from llm2vec_kernels.info_nce.tiles import CHUNK_ELEMENTS, Block, ScoreStatistics, slices

CUDA_CHUNK_ELEMENTS = 1 << 24
"""Elements that one pass touches on a GPU: 64 MiB in fp32."""


class Epilogue(Protocol):
    """A tile of scores. Call `statistics` first or not at all, then `coefficients` once."""

    def __init__(self, block: Block, score_BN: torch.Tensor) -> None:
        """Takes the tile's queries and documents, and their products (see `score_tiles`)."""

    def statistics(self) -> ScoreStatistics:
        """Returns log-sum-exp, positive's score and best negative of each row."""

    def coefficients(
        self, lse_B: torch.Tensor, factor: float, weight_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns factor · weight · (exp(score − lse) − 1 at the positive), `[B, N]`, in the products' dtype.

        It may overwrite the tile. Without weights, all weights are 1.
        """


class TorchEpilogue:
    """An `Epilogue` in PyTorch. Each pass goes over a few rows, so they stay in the cache."""

    def __init__(self, block: Block, score_BN: torch.Tensor) -> None:
        """Scales the products in `score_BN` if needed and leaves documents out, both in place.

        Args:
            block: the tile's queries and documents.
        """
        self.block = block
        self.score_BN = score_BN
        self.largest_B: torch.Tensor | None = None
        chunk = CUDA_CHUNK_ELEMENTS if score_BN.is_cuda else CHUNK_ELEMENTS
        self.row_slices = list(slices(len(score_BN), max(1, chunk // score_BN.shape[1])))
        for rows in self.row_slices:
            _exclude(score_BN[rows], block.part(rows))

    def statistics(self) -> ScoreStatistics:
        """As `Epilogue`. Scores become exp(score − largest): `coefficients` needs no second exponential."""
        parts = [_statistics(self.score_BN[rows], self.block.part(rows)) for rows in self.row_slices]
        statistics = ScoreStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))
        self.largest_B = _finite(torch.maximum(*statistics[1:]))
        return statistics

    def coefficients(
        self, lse_B: torch.Tensor, factor: float, weight_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        lse_B1 = _finite(lse_B)[:, None]
        for rows in self.row_slices:
            score = self.score_BN[rows]
            if self.largest_B is None:
                score.sub_(lse_B1[rows]).exp_()
            else:
                # exp(score − lse) = exp(score − largest) · exp(largest − lse): one exponential for each row.
                score.mul_(torch.exp(self.largest_B[rows, None] - lse_B1[rows]))
            index_B1, here_B1 = _positive(self.block.part(rows))
            score.scatter_add_(1, index_B1, -here_B1.to(score.dtype))
            if weight_B is not None:
                score *= weight_B[rows, None] * factor
            elif factor != 1.0:
                score *= factor
        return self.score_BN.to(self.block.operand_dtype)


def _finite(value: torch.Tensor) -> torch.Tensor:
    """Replaces −inf by 0. A row without any document has −inf, and −inf − (−inf) would be NaN."""
    return value.masked_fill(value.isneginf(), 0.0)


def _positive(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the column of each row's positive (0 if there is none), and whether there is one; `[B, 1]`."""
    return block.positive_Q.clamp(min=0)[:, None], block.positive_Q[:, None] >= 0


def _exclude(score_BN: torch.Tensor, block: Block) -> None:
    """Scales scores if the operands were not scaled, and sets false negatives to −inf; in place."""
    if block.needs_scale:
        score_BN *= block.scale
    if block.query_id_Q is None and block.score_limit_Q is None:
        return
    index_B1, here_B1 = _positive(block)
    positive_B1 = score_BN.gather(1, index_B1)
    if block.query_id_Q is not None and block.document_id_N is not None:
        score_BN.masked_fill_(block.query_id_Q[:, None] == block.document_id_N, float("-inf"))
    if block.score_limit_Q is not None:
        score_BN.masked_fill_(score_BN > block.score_limit_Q[:, None].to(score_BN.dtype), float("-inf"))
    present_B1 = score_BN.gather(1, index_B1)
    score_BN.scatter_(1, index_B1, torch.where(here_B1, positive_B1, present_B1))


def _statistics(score_BN: torch.Tensor, block: Block) -> ScoreStatistics:
    index_B1, here_B1 = _positive(block)
    present_B1 = score_BN.gather(1, index_B1)
    positive_B1 = present_B1.masked_fill(~here_B1, float("-inf"))
    score_BN.scatter_(1, index_B1, present_B1.masked_fill(here_B1, float("-inf")))
    best_negative_B1 = score_BN.amax(1, keepdim=True)
    score_BN.scatter_(1, index_B1, present_B1)
    largest_B1 = _finite(torch.maximum(best_negative_B1, positive_B1))
    lse_B1 = largest_B1 + score_BN.sub_(largest_B1).exp_().sum(1, keepdim=True).log()
    return ScoreStatistics(lse_B1[:, 0], positive_B1[:, 0], best_negative_B1[:, 0])
