"""A user's mistake: the command, what lies around, and the one line that it costs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import sentences

Files = dict[str, bytes]
PAIRS: Files = {"p.jsonl": b'{"query": "fish", "positive": "trout"}\n'}
FREE_SOME = "cannot be written: …: free some space, or write to another disk"


@dataclass(frozen=True)
class Mistake:
    """`line` is what is printed after `llm2vec-ds: error: `; `…` stands for words of another library."""

    line: str
    arguments: tuple[str, ...] = ("train", "RECIPE")
    changes: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    stage: str = "simcse"
    variables: dict[str, str] = field(default_factory=dict)


def snapshot(folder: Path) -> Files:
    """Every file below `folder` but those of the cache, with its content."""
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check_costs_one_line(
    mistake: Mistake,
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs a mistake: one line says what is wrong and what to do, without a traceback or half-done files.

    In the mistake `TMP` stands for `folder`, `MODEL` for `model`, `ROOT` for where commands run, `RECIPE` for
    a recipe that would be fine but for the mistake's changes.
    """
    words = {"TMP": str(folder), "MODEL": str(model), "ROOT": str(Path.cwd())}

    def filled(text: str) -> str:
        return re.sub("|".join(words), lambda found: words[found.group()], text)

    (folder / "texts.txt").write_text("\n".join(sentences(64)) + "\n")
    for file, content in mistake.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    values = recipe(mistake.stage, model, folder / "texts.txt", folder / "run")
    values |= json.loads(filled(json.dumps(mistake.changes)))
    words["RECIPE"] = str(write_recipe(values, folder / "r.yaml"))
    for variable, value in mistake.variables.items():
        monkeypatch.setenv(variable, value)
    before = snapshot(folder)

    assert run(monkeypatch, *map(filled, mistake.arguments)) == 2
    assert_reads(error_line(capsys), filled(mistake.line))
    after = snapshot(folder)
    for name in {"run/recipe.yaml", "run/run.json"} - before.keys():
        after.pop(name, None)
    assert after == before
