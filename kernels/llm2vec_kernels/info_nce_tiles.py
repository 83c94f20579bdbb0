"""Tiles of the score matrix: what `info_nce` holds of it at a time, and what is done to a tile.

Shape legend: Q queries, N documents, D width, B queries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

MIN_TILE_ROWS = 64
"""A narrower matrix product would be bound by reading the documents."""
CHUNK_ELEMENTS = 1 << 21
"""Scores that one pass touches before the next one does: 8 MiB, which stay in the processor's cache."""
CUDA_CHUNK_ELEMENTS = 1 << 24


class BlockStatistics(NamedTuple):
    """What a block of documents says about each query, `[Q]` in fp32 (−inf where there is none)."""

    lse_Q: torch.Tensor
    """log Σ exp(score) over the documents of the block that count, the positive included."""
    positive_score_Q: torch.Tensor
    best_negative_Q: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Queries against a block of documents; see `info_nce.block_log_sum_exp` for the fields."""

    query_QD: torch.Tensor
    document_ND: torch.Tensor
    scale: float
    positive_Q: torch.Tensor
    query_id_Q: torch.Tensor | None = None
    document_id_N: torch.Tensor | None = None
    score_limit_Q: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n_queries, n_documents = len(self.query_QD), len(self.document_ND)
        if self.query_QD.shape[1:] != self.document_ND.shape[1:] or self.query_QD.ndim != 2:
            shapes = f"{tuple(self.query_QD.shape)} and {tuple(self.document_ND.shape)}"
            raise ValueError(f"queries and documents must be [Q, D] and [N, D], not {shapes}")
        if self.query_QD.dtype != self.document_ND.dtype:
            dtypes = f"{self.query_QD.dtype} and {self.document_ND.dtype}"
            raise ValueError(f"queries and documents must share a dtype, not {dtypes}: cast one of them")
        if n_documents == 0:
            raise ValueError("a block needs at least one document")
        if (self.query_id_Q is None) != (self.document_id_N is None):
            raise ValueError("query_id_Q and document_id_N come together or not at all")
        for name, size in (
            ("positive_Q", n_queries),
            ("query_id_Q", n_queries),
            ("document_id_N", n_documents),
            ("score_limit_Q", n_queries),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != (size,):
                raise ValueError(f"{name} must be [{size}], not {tuple(value.shape)}")

    @property
    def score_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 vectors."""
        return torch.promote_types(self.query_QD.dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """What matrix products read: tensor cores take fp16 and bf16 as they are, a CPU is slow at them."""
        return self.query_QD.dtype if self.query_QD.is_cuda else self.score_dtype

    def part(self, rows: slice = slice(None), documents: slice = slice(None)) -> Block:
        """Some queries against some documents; a positive outside becomes −1."""
        positive = self.positive_Q[rows]
        if documents != slice(None):
            inside = (positive >= documents.start) & (positive < documents.stop)
            positive = torch.where(inside, positive - documents.start, -1)
        return replace(
            self,
            query_QD=self.query_QD[rows],
            document_ND=self.document_ND[documents],
            positive_Q=positive,
            query_id_Q=None if self.query_id_Q is None else self.query_id_Q[rows],
            document_id_N=None if self.document_id_N is None else self.document_id_N[documents],
            score_limit_Q=None if self.score_limit_Q is None else self.score_limit_Q[rows],
        )


def slices(length: int, step: int) -> Iterator[slice]:
    """`step` rows at a time."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def full_precision(allow_tf32: bool) -> Iterator[None]:
    """fp32 products are fp32, whatever the process-wide TF32 switch says; and no graph."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if allow_tf32 else "ieee"
    try:
        with torch.no_grad():
            yield
    finally:
        switch.fp32_precision = before


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated and written in `out`'s dtype, fp32 for fp16 and bf16 operands."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out.dtype, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += torch.mm(a, b, total.dtype)


class TorchEpilogue:
    """What happens to a tile after its matrix product: in passes over a few rows that stay in the cache."""

    def __init__(self, block: Block, score_BN: torch.Tensor) -> None:
        """Scales the products in `score_BN` (unless the queries were) and excludes, both in place.

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

    def statistics(self) -> BlockStatistics:
        """lse, positive and best negative of each row; scores become exp(score − largest)."""
        parts = [_statistics(self.score_BN[rows], self.block.part(rows)) for rows in self.row_slices]
        statistics = BlockStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))
        self.largest_B = _finite(torch.maximum(*statistics[1:]))
        return statistics

    def coefficients(self, lse_B: torch.Tensor, factor: float) -> torch.Tensor:
        """factor · (exp(score − lse) − 1 at the positive), `[B, N]` in the products' dtype; overwrites."""
        lse_B1 = _finite(lse_B)[:, None]
        for rows in self.row_slices:
            score = self.score_BN[rows]
            if self.largest_B is None:
                score.sub_(lse_B1[rows]).exp_()
            else:
                score.mul_(torch.exp(self.largest_B[rows, None] - lse_B1[rows]))
            index_B1, here_B1 = _positive(self.block.part(rows))
            score.scatter_add_(1, index_B1, -here_B1.to(score.dtype))
            if factor != 1.0:
                score *= factor
        return self.score_BN.to(self.block.operand_dtype)


def _finite(value: torch.Tensor) -> torch.Tensor:
    """0 for −inf, which a row without any document has: −inf less 0 is −inf still, less −inf it is NaN."""
    return value.masked_fill(value.isneginf(), 0.0)


def _positive(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's positive, and whether it is one (else column 0); both `[B, 1]`."""
    return block.positive_Q.clamp(min=0)[:, None], block.positive_Q[:, None] >= 0


def _exclude(score_BN: torch.Tensor, block: Block) -> None:
    """Scale where the operands were not scaled, −inf at false negatives; in place."""
    if block.operand_dtype != block.score_dtype:
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


def _statistics(score_BN: torch.Tensor, block: Block) -> BlockStatistics:
    index_B1, here_B1 = _positive(block)
    present_B1 = score_BN.gather(1, index_B1)
    positive_B1 = present_B1.masked_fill(~here_B1, float("-inf"))
    score_BN.scatter_(1, index_B1, present_B1.masked_fill(here_B1, float("-inf")))
    best_negative_B1 = score_BN.amax(1, keepdim=True)
    score_BN.scatter_(1, index_B1, present_B1)
    largest_B1 = _finite(torch.maximum(best_negative_B1, positive_B1))
    lse_B1 = largest_B1 + score_BN.sub_(largest_B1).exp_().sum(1, keepdim=True).log()
    return BlockStatistics(lse_B1[:, 0], positive_B1[:, 0], best_negative_B1[:, 0])


def score_tiles(block: Block, tile_mib: float) -> Iterator[tuple[slice, TorchEpilogue]]:
    """Rows and their scores against all documents, a few rows at a time, in one reused buffer."""
    n_queries, n_documents = len(block.query_QD), len(block.document_ND)
    row_bytes = n_documents * block.score_dtype.itemsize
    n_rows = min(n_queries, max(MIN_TILE_ROWS, int(tile_mib * 2**20) // row_bytes))
    buffer = block.query_QD.new_empty(n_rows * n_documents, dtype=block.score_dtype)
    scaled = block.operand_dtype == block.score_dtype
    for rows in slices(n_queries, max(1, n_rows)):
        query_BD = block.query_QD[rows].to(block.operand_dtype)
        score_BN = buffer[: len(query_BD) * n_documents].view(-1, n_documents)
        for documents, document_CD in document_chunks(block):
            product(query_BD * block.scale if scaled else query_BD, document_CD.T, score_BN[:, documents])
        yield rows, TorchEpilogue(block.part(rows), score_BN)


def document_chunks(block: Block) -> Iterator[tuple[slice, torch.Tensor]]:
    """Documents in the dtype of the products: as they are, or a chunk at a time where they must be cast."""
    n_documents, width = block.document_ND.shape
    cast = block.document_ND.dtype != block.operand_dtype
    step = max(1, CHUNK_ELEMENTS // width) if cast else n_documents
    for documents in slices(n_documents, step):
        yield documents, block.document_ND[documents].to(block.operand_dtype)
