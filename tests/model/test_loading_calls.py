"""In the source: a call that loads a model says whether its code may run. Left open, transformers asks."""

from __future__ import annotations

import ast

import pytest

from tests.support.runs import ROOT

OTHER_LOADERS = {"Encoder", "cls", "LoraConfig", "LLM2Vec", "LlamaBiForMNTP"}
"""They have a `from_pretrained` without that word; the last two are upstream's, in a benchmark of it."""
SENTENCE_TRANSFORMERS = {"SentenceTransformer", "CrossEncoder"}
"""They load where they are given a path."""


def open_loads(source: str) -> list[int]:
    """Lines of the calls that do not say it."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _loads(call) and not _says_it(call)]


def _says_it(call: ast.Call) -> bool:
    return "trust_remote_code" in {keyword.arg for keyword in call.keywords}


def _loads(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(ast.Name(owner), "from_pretrained" | "from_config"):
            return owner not in OTHER_LOADERS
        case ast.Attribute(_, "from_pretrained" | "from_config"):
            return True
        case ast.Attribute(_, name) | ast.Name(name):
            return name in SENTENCE_TRANSFORMERS and bool(call.args)
    return False


@pytest.mark.parametrize("folder", ["llm2vec_ds", "benchmarks", "slurm"])
def test_every_load_says_whether_code_may_run(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {file.relative_to(ROOT): open_loads(file.read_text()) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("source", "is_open"),
    [
        ("AutoConfig.from_pretrained(path)", True),
        ("transformers.AutoModel.from_pretrained(path, **options)", True),
        ("AutoModel.from_config(config)", True),
        ("SentenceTransformer(path)", True),
        ("SentenceTransformer(modules=[trunk])", False),
        ("AutoConfig.from_pretrained(path, trust_remote_code=False)", False),
        ("Encoder.from_pretrained(path)", False),
    ],
)
def test_such_a_load_is_found(source: str, is_open: bool) -> None:
    assert bool(open_loads(source)) == is_open
