"""YAML and CSV that people write."""

from __future__ import annotations

import pytest

from llm2vec_ds.storage.reading import csv_rows, parse_yaml


def test_equal_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="`seed` is there twice, in lines 1 and 3"):
        parse_yaml("seed: 1\nmax_steps: 2\nseed: 3\n")
    with pytest.raises(ValueError, match="`lr` is there twice, in lines 2 and 3"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ValueError, match="`a` is there twice, in lines 1 and 1"):
        parse_yaml("{a: 1, a: 1}")


def test_equal_keys_of_different_sections_are_not() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 1}\n") == {"a": {"x": 1}, "b": {"x": 1}}


def test_merged_keys_may_be_replaced() -> None:
    text = "base: &base {lr: 1, eps: 2}\nown:\n  <<: *base\n  lr: 3\n"
    assert parse_yaml(text)["own"] == {"lr": 3, "eps": 2}


def test_a_merge_of_a_merge() -> None:
    text = "a: &a {x: 1}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: *b\n  y: 3\nd: *b\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2, "y": 3}, "d": {"x": 2}}


def test_rows_of_a_csv_file() -> None:
    lines = ["text,label\n", '"hello, my name is Ann",1\n', "\n", '"two\n', 'lines",2\n']
    rows = [({"text": "hello, my name is Ann", "label": "1"}, 2), ({"text": "two\nlines", "label": "2"}, 5)]
    assert list(csv_rows(lines)) == rows


@pytest.mark.parametrize(
    ("lines", "mistake"),
    [
        (["text\n", "plain\n", "hello, my name is Ann\n"], "line 3: 2 fields, but the header has 1"),
        (["a,b\n", "1\n"], "line 2: 1 fields, but the header has 2"),
        (["a\n", '"never closed\n'], "after line 2: not a CSV file in UTF-8: unexpected end of data"),
        (["a\n", '"x" y\n'], "after line 2: not a CSV file"),
    ],
)
def test_rows_that_do_not_fit_the_header_are_refused(lines: list[str], mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake):
        list(csv_rows(lines))
