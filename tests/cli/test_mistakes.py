"""What a user gets wrong costs one line: the tables in `test_mistakes_*.py`, by command. And usage errors."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from tests.support.in_process import error_line, run


def tables() -> list[ast.Dict]:
    """The dictionary `MISTAKES` of each file."""
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_mistakes_*.py")]
    return [
        node.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and ast.unparse(node.targets[0]) == "MISTAKES"
    ]


def test_there_are_many() -> None:
    """No key twice: the later one would take the earlier one's place unseen."""
    names = Counter(ast.unparse(key) for table in tables() for key in table.keys if key is not None)
    assert len(names) >= 100
    assert set(names.values()) == {1}


@pytest.mark.parametrize("arguments", [["frobnicate"], ["encode"], ["train"], ["doctor", "--chek"]])
def test_usage_errors_stay_usual(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "Usage: llm2vec-ds" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["report", "TMP"], "matplotlib", "report"),
        (["ablate", "recipes/smollm2_ablation.yaml", "--output", "TMP/a"], "matplotlib", "report"),
        (["demo", "--output", "TMP/d"], "sklearn", "demo"),
        (["evaluate", "mteb", "--model", "TMP", "--task", "sts:a.csv"], "mteb", "eval"),
        (["evaluate", "words", "--model", "TMP", "--train", "a", "--test", "b"], "seqeval", "eval"),
        (["export", "TMP", "--output", "TMP/g.gguf", "--format", "gguf"], "gguf", "gguf"),
        (["export", "TMP", "--output", "TMP/o", "--format", "onnx"], "onnxruntime", "onnx"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(
    arguments: list[str],
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda *of: None if of[0] == package else found(*of))
    assert run(monkeypatch, *(word.replace("TMP", str(tmp_path)) for word in arguments)) == 2
    assert error_line(capsys) == f"{package} is not installed: pip install 'llm2vec-ds[{extra}]'"
    assert not list(tmp_path.iterdir())
