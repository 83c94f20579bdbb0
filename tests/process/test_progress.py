"""Long work says how far it is, also where there is no terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from llm2vec_ds.process import progress
from llm2vec_ds.process.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `Progress` sees."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("encode", "text", total=1000, initial=400) as bar:
        for _ in range(4):
            clock[0] += 5
            bar.update(50)
    assert caplog.messages == [
        "encode: 500 of 1000 texts, 10 a second, 00:50 left",
        "encode: 600 of 1000 texts, 10 a second, 00:40 left",
    ]


def test_an_unknown_total_has_no_end(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("tokenise", "text") as bar:
        clock[0] += 20
        bar.update(0)
        clock[0] += 20
        bar.update(2000)
    assert caplog.messages == ["tokenise: 0 texts, 0 a second", "tokenise: 2000 texts, 50 a second"]


def test_work_that_is_not_shown_says_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("encode", "text", shown=False) as bar:
        clock[0] += 60
        bar.update(10)
    assert not caplog.messages


def test_a_terminal_gets_a_bar(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("encode", "text", total=10) as bar:
        clock[0] += 60
        bar.update(10)
    assert "encode: 100%" in terminal.getvalue()
    assert not caplog.messages
