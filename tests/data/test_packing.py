"""Token budgets and the packed stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.errors import UserError


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(50, 200))
def test_every_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = plan_micro_batches(lengths, budget)
    assert sorted(np.concatenate(groups).tolist() if groups else []) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget
        own = [lengths[i] for i in group]
        assert own == sorted(own, reverse=True)
    full = [sum(lengths[i] for i in group) for group in groups[:-1]]
    assert all(filled + max(lengths) > budget for filled in full)


def test_a_text_over_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match="51 tokens is longer than micro_batch_tokens=50"):
        plan_micro_batches([3, 51], 50)


def test_stream_of_two_texts() -> None:
    batch = pack(
        [TokenizedText([5, 6, 7], 1, 3, 0), TokenizedText([8, 9], 0, 1, 0)],
        labels=[np.array([-100, 6, -100]), np.array([-100, 9])],
    )
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    assert batch.pool_mask.tolist() == [False, True, True, True, False]
    assert batch.labels is not None
    assert batch.labels.tolist() == [-100, 6, -100, -100, 9]
    assert batch.segment_ids().tolist() == [0, 0, 0, 1, 1]
