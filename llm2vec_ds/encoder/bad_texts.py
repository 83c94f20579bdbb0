"""Texts that get no vector: empty ones, and what is no text."""

from __future__ import annotations

from typing import Literal

from llm2vec_ds.errors import UserError

BadTexts = Literal["raise", "nan"]
"""What to do about such a text: raise `BadText`, or put a row of NaN in its place."""


class BadText(UserError):
    """A text that gets no vector.

    Attributes:
        row: its number, counted from 0.
        what: what is wrong with it, such as `is empty`.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"text {row} (counted from 0) {what}: remove it, or pass bad_texts='nan'")
        self.row, self.what = row, what
