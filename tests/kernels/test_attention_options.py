"""Options that mean nothing are refused when they are made, whichever backend would run."""

from __future__ import annotations

from typing import Any

import pytest
from llm2vec_kernels.attention import AttentionOptions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": -1}, "window -1 is negative"),
        ({"softcap": 0.0}, "softcap 0.0 is not positive"),
        ({"softcap": -2.0}, "softcap -2.0 is not positive"),
        ({"dropout_p": 1.0}, "dropout_p 1.0 is not in"),
        ({"dropout_p": -0.1}, "dropout_p -0.1 is not in"),
        ({"dropout_p": float("nan")}, "dropout_p nan is not in"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionOptions(0.5, **wrong)


def test_the_ends_of_the_ranges_are_options() -> None:
    assert AttentionOptions(0.5, window=0, softcap=1e-3, dropout_p=0.0).window == 0
    assert AttentionOptions(0.5) == AttentionOptions(0.5, None, None, 0.0, False)
