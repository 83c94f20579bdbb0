"""The documentation builds as a site, and its pages of reference hold all that the code has."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import llm2vec_ds
from llm2vec_ds.cli.app import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does it: whatever mkdocs warns of is an error."""
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return folder


def words(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_the_command_line_has_every_command_and_option(site: Path) -> None:
    said = words(site / "cli.html")
    pending = [("llm2vec-ds", typer.main.get_command(app))]
    commands = 0
    while pending:
        name, command = pending.pop()
        inner = getattr(command, "commands", {})
        pending += [(f"{name} {inner_name}", each) for inner_name, each in inner.items()]
        if name == "llm2vec-ds":
            continue
        commands += 1
        assert f"{name}\n" in said or f"{name} " in said
        for param in command.params:
            for option in param.opts if param.param_type_name == "option" else []:
                assert option in said, (name, option)
    assert commands > 15


def test_the_python_page_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in set(llm2vec_ds.__all__) - {"__version__"}:
        assert re.search(rf'id="llm2vec_ds\.[\w.]*\b{name}"', page), name


def test_files_beside_the_documents_are_in_the_site(site: Path) -> None:
    """Their links lead to copies; a relative link out of docs/ would be broken."""
    assert (site / "recipes" / "smollm2_135m" / "distil.yaml").is_file()
    assert (site / "contributing.html").is_file()
    assert "contributing.html" in (site / "index.html").read_text(encoding="utf-8")


def test_pages_ask_no_other_host(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*src="([^"]+)|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="([^"]+)',
            page.read_text(encoding="utf-8"),
        )
        assert not [found for found in loaded if "".join(found).startswith(("http", "//"))], page.name
