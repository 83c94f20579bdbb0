"""The tutorial does what it says: its files are written and its commands run, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm2vec_ds.recipe.files import load_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """(language, file name or nothing, text) of each block. A block of `sh` is not for this machine."""
    return [(found[1], found[2] or "", found[3]) for found in BLOCK.finditer(PAGE.read_text())]


def test_its_recipes_are_valid(tmp_path: Path) -> None:
    recipes = [(name, text) for language, name, text in blocks() if language == "yaml"]
    assert [name for name, _ in recipes] == ["mntp.yaml", "supervised.yaml"]
    for name, text in recipes:
        (tmp_path / name).write_text(text)
        load_recipe(tmp_path / name)


@pytest.mark.slow
def test_it_makes_an_encoder_that_finds_and_serves(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["LLM2VEC_DS_CACHE"] = str(Path.home() / ".cache" / "llm2vec-ds")
    environment.pop("HF_HUB_OFFLINE", None)
    said = ""
    for language, name, text in blocks():
        if name:
            (tmp_path / name).write_text(text)
        elif language == "bash":
            outcome = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert outcome.returncode == 0, f"{text}\n{outcome.stderr[-3000:]}"
            said += outcome.stdout
    untrained, mntp, pairs = (int(count) for count in re.findall(r"(\d+) of \d+ queries find", said))
    assert pairs > 2 * max(untrained, mntp)
    assert "cosine of both vectors: 1.0000" in said
