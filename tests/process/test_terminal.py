"""Terminals and locales that know few characters: nothing crashes, least of all after the work is done."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm2vec_ds.process.terminal import say_what_it_can

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_unknown_characters_are_escaped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    say_what_it_can()
    print("Hügel", file=getattr(sys, name))
    assert raw.getvalue() == b"H\\xfcgel\n"


def command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "llm2vec_ds", *arguments]
    return subprocess.run(line, env={**os.environ, **ASCII}, capture_output=True, timeout=300, check=False)


@pytest.mark.slow
def test_commands_on_an_ascii_terminal(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "grüne Hügel"}, ensure_ascii=False) + "\n", "utf-8")
    output = tmp_path / "v.jsonl"
    done = command(
        "encode",
        "--model",
        str(tiny_model_dir),
        "--input",
        str(tmp_path / "t.jsonl"),
        "--output",
        str(output),
    )
    assert done.returncode == 0, done.stderr
    found = command("search", str(output), "rain")
    assert (found.returncode, found.stdout.rstrip().endswith(b"gr\\xfcne H\\xfcgel")) == (0, True), (
        found.stderr
    )
