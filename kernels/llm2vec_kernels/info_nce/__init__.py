"""The contrastive loss, computed one tile of scores at a time."""

from llm2vec_kernels.info_nce.api import InfoNce, info_nce

__all__ = ["InfoNce", "info_nce"]
