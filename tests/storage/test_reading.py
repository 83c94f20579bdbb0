"""YAML that people write."""

from __future__ import annotations

import pytest

from llm2vec_ds.storage.reading import parse_yaml


def test_equal_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="`seed` occurs twice, in lines 1 and 3"):
        parse_yaml("seed: 1\nmax_steps: 2\nseed: 3\n")
    with pytest.raises(ValueError, match="`lr` occurs twice, in lines 2 and 3"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ValueError, match="`a` occurs twice, in lines 1 and 1"):
        parse_yaml("{a: 1, a: 1}")


def test_equal_keys_of_different_sections_are_not() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 1}\n") == {"a": {"x": 1}, "b": {"x": 1}}


def test_merged_keys_may_be_replaced() -> None:
    text = "base: &base {lr: 1, eps: 2}\nown:\n  <<: *base\n  lr: 3\n"
    assert parse_yaml(text)["own"] == {"lr": 3, "eps": 2}


def test_a_merge_of_a_merge() -> None:
    text = "a: &a {x: 1}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: *b\n  y: 3\nd: *b\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2, "y": 3}, "d": {"x": 2}}
