"""Tiles of the score matrix that `info_nce` holds one at a time, and the matrix products around them.

Shape legend: Q queries, N documents, D width, G a guide's width, B queries and C documents of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal, NamedTuple

import torch

MIN_TILE_ROWS = 64
"""A tile has at least this many rows, or all queries. With fewer, reading documents limits the product."""
CHUNK_ELEMENTS = 1 << 21
"""Elements that one pass touches before the next pass starts. 8 MiB in fp32 stay in the processor's cache."""
HELD_ELEMENTS = 1 << 24
"""Elements of an fp32 product of fp16 or bf16 operands that is held before it is added to a total: 64 MiB."""


class ScoreStatistics(NamedTuple):
    """Statistics of a block's scores for each query, `[Q]` in fp32. −inf if there is no such score."""

    lse_Q: torch.Tensor
    """log Σ exp(score) over the documents of the block that count, the positive included."""
    positive_score_Q: torch.Tensor
    best_negative_Q: torch.Tensor


class BlockStatistics(NamedTuple):
    """`ScoreStatistics` and a count for the guide; all `[Q]` in fp32."""

    lse_Q: torch.Tensor
    positive_score_Q: torch.Tensor
    best_negative_Q: torch.Tensor
    guided_Q: torch.Tensor
    """How many documents of the block the guide leaves out beyond those that ids leave out."""


class Guide(NamedTuple):
    """Another model's vectors of the same texts (Solatorio, 2024, arXiv 2402.16829).

    A document other than the positive is left out if the guide's product of query and document is above the
    query's limit.
    """

    query_QG: torch.Tensor
    document_NG: torch.Tensor
    limit_Q: torch.Tensor

    def part(self, rows: slice, documents: slice) -> Guide:
        return Guide(self.query_QG[rows], self.document_NG[documents], self.limit_Q[rows])


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
    guide: Guide | None = None
    hardness: float = 0.0

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
            raise ValueError("query_id_Q and document_id_N belong together: give both or neither")
        for name, size in (
            ("positive_Q", n_queries),
            ("query_id_Q", n_queries),
            ("document_id_N", n_documents),
            ("score_limit_Q", n_queries),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != (size,):
                raise ValueError(f"{name} must be [{size}], not {tuple(value.shape)}")
        if self.guide is not None:
            given = [list(x.shape) for x in self.guide]
            width = given[0][-1]
            if given != [[n_queries, width], [n_documents, width], [n_queries]]:
                fitting = f"[{n_queries}, G], [{n_documents}, G] and [{n_queries}]"
                raise ValueError(f"a guide must be {fitting}, not {given}")

    @property
    def score_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 vectors."""
        return torch.promote_types(self.query_QD.dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype that matrix products read. Tensor cores take fp16 and bf16. A CPU is slow at them."""
        return self.query_QD.dtype if self.query_QD.is_cuda else self.score_dtype

    @property
    def lift(self) -> float:
        """The factor of a negative's score: (scale + hardness) · q·d = lift · (scale · q·d)."""
        return 1.0 + self.hardness / self.scale if self.hardness else 1.0

    @property
    def needs_scale(self) -> bool:
        """Whether operands are too coarse to be scaled before their product."""
        return self.operand_dtype != self.score_dtype

    def part(self, rows: slice = slice(None), documents: slice = slice(None)) -> Block:
        """Returns some queries against some documents. A positive outside becomes −1."""
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
            guide=None if self.guide is None else self.guide.part(rows, documents),
        )


def slices(length: int, step: int) -> Iterator[slice]:
    """Yields slices of `step` rows; the last one may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


Precision = Literal["fp32", "tf32", "bf16"]
"""The format that products of fp32 vectors round operands to. Sums are fp32. tf32 only acts on a GPU."""


def round_operand(x: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Rounds fp32 vectors to bf16 if `precision` is `bf16`. Returns others unchanged."""
    return x.bfloat16() if precision == "bf16" and x.dtype == torch.float32 else x


@contextmanager
def computed_in(precision: Precision) -> Iterator[None]:
    """Sets fp32 products to fp32 or tf32, whatever the process-wide switch says. Records no graph."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with torch.no_grad():
            yield
    finally:
        switch.fp32_precision = before


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Computes out = a @ b, accumulated and written in `out`'s dtype: fp32 for fp16 and bf16 operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def add_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Computes out += a @ b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        out += torch.mm(a, b, out.dtype)


class Tile(NamedTuple):
    """Some queries of a block, and their products with all documents.

    Products are scores unless `block.needs_scale`. Those of negatives are multiplied by `block.lift`. A
    document that the guide leaves out has −inf. `guided_B` counts them (see `BlockStatistics`), if there is a
    guide.
    """

    rows: slice
    score_BN: torch.Tensor
    guided_B: torch.Tensor | None


def score_tiles(block: Block, tile_mib: float) -> Iterator[Tile]:
    """Yields the block a few rows at a time, in one reused buffer."""
    n_queries, n_documents = len(block.query_QD), len(block.document_ND)
    row_bytes = n_documents * block.score_dtype.itemsize
    n_rows = min(n_queries, max(MIN_TILE_ROWS, int(tile_mib * 2**20) // row_bytes))
    buffer = block.query_QD.new_empty(n_rows * n_documents, dtype=block.score_dtype)
    for rows in slices(n_queries, max(1, n_rows)):
        query_BD = block.query_QD[rows].to(block.operand_dtype)
        score_BN = buffer[: len(query_BD) * n_documents].view(-1, n_documents)
        for documents, document_CD in document_chunks(block):
            scaled_BD = query_BD if block.needs_scale else query_BD * block.scale
            product(scaled_BD, document_CD.T, score_BN[:, documents])
        own = block.part(rows)
        _lift_negatives(score_BN, own)
        yield Tile(rows, score_BN, _leave_out(score_BN, own))


def _lift_negatives(score_BN: torch.Tensor, block: Block) -> None:
    """Multiplies negatives by `lift`, in place. A positive stays what it is."""
    if block.lift == 1.0:
        return
    index_B1, here_B1 = block.positive_Q.clamp(min=0)[:, None], block.positive_Q[:, None] >= 0
    positive_B1 = score_BN.gather(1, index_B1)
    score_BN *= block.lift
    score_BN.scatter_(1, index_B1, torch.where(here_B1, positive_B1, positive_B1 * block.lift))


def _leave_out(score_BN: torch.Tensor, block: Block) -> torch.Tensor | None:
    """Sets documents that the guide leaves out to −inf, in place, a few at a time. Returns their number."""
    if block.guide is None:
        return None
    n_documents, n_queries = len(block.document_ND), max(1, len(score_BN))
    guided_B = score_BN.new_zeros(len(score_BN))
    column_N = torch.arange(n_documents, device=score_BN.device)
    for documents in slices(n_documents, max(1, HELD_ELEMENTS // n_queries)):
        query_BG, document_CG, limit_B = block.guide.part(slice(None), documents)
        out_BC = query_BG @ document_CG.T > limit_B[:, None]
        out_BC &= block.positive_Q[:, None] != column_N[documents]
        score_BN[:, documents].masked_fill_(out_BC, float("-inf"))
        if block.query_id_Q is not None and block.document_id_N is not None:
            out_BC &= block.query_id_Q[:, None] != block.document_id_N[documents]
        guided_B += out_BC.sum(1)
    return guided_B


def document_chunks(block: Block) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields documents in the products' dtype: all at once, or a chunk at a time if they must be cast."""
    n_documents, width = block.document_ND.shape
    cast = block.document_ND.dtype != block.operand_dtype
    step = max(1, CHUNK_ELEMENTS // width) if cast else n_documents
    for documents in slices(n_documents, step):
        yield documents, block.document_ND[documents].to(block.operand_dtype)


def documents_of_a_tile(block: Block, tile_mib: float) -> int:
    """Returns how many documents meet all queries at a time in the documents' gradient.

    Neither side of a tile may be short, because a product with a small result does not fill a GPU. And the
    documents' total, which is fp32, must not be much larger than a tile.
    """
    elements = int(tile_mib * 2**20) // block.score_dtype.itemsize
    n_queries, width = block.query_QD.shape
    n_documents = max(isqrt(elements) // 2, elements // max(1, n_queries))
    n_documents = min(n_documents, HELD_ELEMENTS // max(1, width))
    return max(MIN_TILE_ROWS, n_documents // MIN_TILE_ROWS * MIN_TILE_ROWS)  # rows aligned for tensor cores
