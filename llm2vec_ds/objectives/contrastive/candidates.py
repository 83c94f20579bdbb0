"""Candidates: the texts of all ranks that this rank's texts are compared with, and the two sums over them.

Shape legend: Q rows, R this rank's candidates, N those of all ranks.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from llm2vec_kernels.info_nce.api import info_nce
from llm2vec_kernels.info_nce.log_sum_exp import LogSumExp, log_sum_exp
from llm2vec_kernels.info_nce.tiles import Guide

from llm2vec_ds.distributed import all_gather_counts, gather_rows, rank
from llm2vec_ds.objectives.contrastive.ring import ring_info_nce, ring_log_sum_exp
from llm2vec_ds.objectives.contrastive.texts import Limits, Outcome, Texts
from llm2vec_ds.recipe.objectives import ContrastiveConfig


class Rows(NamedTuple):
    """This rank's texts that are compared with candidates.

    Attributes:
        texts: the Q texts.
        label_Q, label_R: int64 labels of the rows and of this rank's candidates. A candidate with the same
            label as a row is no negative for it.
        limits: the rows' limits.
    """

    texts: Texts
    label_Q: torch.Tensor
    label_R: torch.Tensor
    limits: Limits


class Candidates:
    """The candidates of all ranks. All ranks call each method together.

    With `exchange: gather`, the first sum gathers all ranks' candidates and later sums use them again. With
    `exchange: ring`, the candidates go around the ring for each sum.
    """

    def __init__(self, own: Texts, config: ContrastiveConfig, wire_dtype: torch.dtype) -> None:
        """Takes this rank's candidates (`own`). Vectors are rounded to `wire_dtype` for other ranks."""
        self.own, self.wire_dtype = own, wire_dtype
        self.goes_round, self.hardness = config.exchange == "ring", config.hardness
        self.precision = config.score_precision

    @cached_property
    def _vector_ND(self) -> torch.Tensor:
        return gather_rows(self.own.vector_ND, self.wire_dtype)

    @cached_property
    def _guide_NG(self) -> torch.Tensor:
        assert self.own.guide_NG is not None
        return gather_rows(self.own.guide_NG)

    def info_nce(self, rows: Rows, scale: torch.Tensor) -> Outcome:
        """Returns each row's loss. The first Q of this rank's candidates are the rows' positives."""
        options = self._options(rows, scale)
        if self.goes_round:
            return ring_info_nce(rows.texts.vector_ND, self.own.vector_ND, **options)
        before = sum(all_gather_counts(len(self.own), scale.device)[: rank()])
        positive_Q = before + torch.arange(len(rows.texts), device=scale.device)
        result = info_nce(rows.texts.vector_ND, self._vector_ND, positive_Q, **options)
        return Outcome(result.loss_Q, result.hit_Q, result.guided_Q)

    def log_sum_exp(self, rows: Rows, scale: torch.Tensor) -> LogSumExp:
        """Returns log Σ exp(score), for rows without a positive among the candidates; −inf if none counts."""
        options = self._options(rows, scale)
        if self.goes_round:
            return ring_log_sum_exp(rows.texts.vector_ND, self.own.vector_ND, **options)
        return log_sum_exp(rows.texts.vector_ND, self._vector_ND, **options)

    def _options(self, rows: Rows, scale: torch.Tensor) -> dict[str, Any]:
        texts, limits, guide = rows.texts, rows.limits, None
        if texts.guide_NG is not None and self.own.guide_NG is not None and limits.guide_Q is not None:
            candidate_G = self.own.guide_NG if self.goes_round else self._guide_NG
            guide = Guide(texts.guide_NG, candidate_G, limits.guide_Q)
        shared = {
            "scale": scale,
            "query_id_Q": rows.label_Q,
            "score_limit_Q": limits.score_Q,
            "guide": guide,
            "hardness": self.hardness,
            "precision": self.precision,
        }
        if self.goes_round:
            return shared | {"document_id_R": rows.label_R, "wire_dtype": self.wire_dtype}
        return shared | {"document_id_N": gather_rows(rows.label_R)}
