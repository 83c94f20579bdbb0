"""Documents tell the truth: their tables come from the code, links lead somewhere, commands run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from llm2vec_ds import __version__
from llm2vec_ds.recipe.habits import HABITS
from llm2vec_ds.recipe.objectives import SECTIONS
from llm2vec_ds.recipe.recipe import documented_keys
from llm2vec_ds.storage.tables import mean_and_spread

ROOT = Path(__file__).resolve().parents[1]
KEYS = ROOT / "docs" / "recipe_keys.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def check_table(path: Path, head: str, rows: list[str]) -> None:
    """The table below `head` has these rows, or gets them under UPDATE_DOCS."""
    before, found, after = path.read_text().partition(head)
    assert found
    written = re.match(r"(?:\|.+\n)*", after)
    assert written is not None
    table = "".join(f"{row}\n" for row in rows)
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(before + head + table + after[written.end() :])
    else:
        assert written.group() == table


def test_tables_of_recipe_keys_are_those_of_the_code() -> None:
    """`UPDATE_DOCS=1 pytest tests/test_docs.py` writes them."""
    path, start, end = KEYS, "<!-- keys -->\n", "<!-- end of keys -->\n"
    before, _, rest = path.read_text().partition(start)
    written, found, after = rest.partition(end)
    assert found
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(before + start + key_tables() + end + after)
    else:
        assert written == key_tables()


def key_tables() -> str:
    """A heading and a table for each section of a recipe, in the order of the code."""
    sections: dict[str, list[str]] = {"": []}
    for key, default, meaning in documented_keys():
        linked = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", meaning)
        rows = sections.setdefault(key.rpartition(".")[0], [])
        rows.append(f"| `{key}` | `{default}` | {linked} |\n")
    head = "| key | default | meaning |\n|---|---|---|\n"
    return "".join(
        f"\n## {f'Section `{name}`' if name else 'Keys of no section'}\n\n{head}{''.join(rows)}"
        for name, rows in sections.items()
    )


def test_table_of_habits_is_that_of_the_code() -> None:
    """`UPDATE_DOCS=1 pytest tests/test_docs.py` writes it."""
    names: dict[str, list[str]] = {}
    for name, answer in HABITS.items():
        names.setdefault(answer, []).append(f"`{name}`")
    rows = [f"| {', '.join(known)} | {answer} |" for answer, known in names.items()]
    check_table(KEYS, "| known elsewhere as | set here |\n|---|---|\n", rows)


RESULTS = ROOT / "docs" / "results"
SENTENCE_SCORES = ("STS-stsb_dev", "Retrieval-wikiqa", "Clustering-pairs", "Classification-pairs")
WORD_TASKS = ("pos", "chunks", "entities")
SENTENCE_HEAD = " | STS-B dev | WikiQA | clustering | classification |"
WORD_HEAD = " | tags | chunks | entities |"
Scores = list[dict[str, float]]
"""Of one variant, by seed."""


def scores_in(folder: str) -> dict[str, Scores]:
    results = json.loads((RESULTS / folder / "results.json").read_text())
    return {variant: list(by_seed.values()) for variant, by_seed in results["scores"].items()}


def over_seeds(name: str, seeds: Scores) -> str:
    return mean_and_spread([scores[name] for scores in seeds if name in scores])


def sentence_cells(seeds: Scores) -> str:
    return " | ".join(over_seeds(name, seeds) for name in SENTENCE_SCORES)


def word_cells(seeds: Scores) -> str:
    """A word's own tokens, and those before; bold is the paper's reading, which follows from MNTP."""
    cells = []
    for task in WORD_TASKS:
        own, before = (f"{task}, {shift}_token" for shift in ("same", "next"))
        if own in seeds[0]:
            cells.append(f"{over_seeds(own, seeds)}, **{over_seeds(task, seeds)}**")
        else:
            cells.append(f"**{over_seeds(task, seeds)}**, {over_seeds(before, seeds)}")
    return " | ".join(cells)


def test_the_tables_of_results_are_those_of_the_numbers() -> None:
    """`UPDATE_DOCS=1 pytest tests/test_docs.py` writes them."""
    page = ROOT / "docs" / "results.md"
    found = scores_in("2026-11-29_smollm2_cpu_seeds")
    rows = [f"| {variant} | {sentence_cells(seeds)} |" for variant, seeds in found.items()]
    check_table(page, f"| variant{SENTENCE_HEAD}\n{'|---' * 5}|\n", rows)
    rows = [f"| {variant} | {word_cells(seeds)} |" for variant, seeds in found.items()]
    check_table(page, f"| words{WORD_HEAD}\n{'|---' * 4}|\n", rows)
    found = scores_in("2026-11-29_gemma3_270m_quick")
    rows = [f"| {v} | {sentence_cells(seeds)} | {word_cells(seeds)} |" for v, seeds in found.items()]
    check_table(page, f"| Gemma 3 270M{SENTENCE_HEAD[:-2]}{WORD_HEAD}\n{'|---' * 8}|\n", rows)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_readme_starts_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


def test_the_readme_explains_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, _, table = (ROOT / "README.md").read_text().partition("| extra: ")
    explained = re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)
    assert sorted(explained) == sorted(project["optional-dependencies"])


def test_all_files_name_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == project["version"] == citation["version"] == __version__
    assert newest.group(2) == str(citation["date-released"])


@pytest.mark.parametrize("stage", SECTIONS)
def test_every_stage_is_described(stage: str) -> None:
    (sentence,) = re.findall(r"Its `stage` is [^.]*", (ROOT / "README.md").read_text())
    assert f"`{stage}`" in sentence
    assert f"`{stage}`" in (ROOT / "docs" / "recipe.md").read_text()


def test_the_first_screen_of_the_readme_fits_60_lines() -> None:
    first, _, _ = (ROOT / "README.md").read_text().partition("\n## ")
    assert len(first.splitlines()) <= 60


@pytest.mark.slow
def test_commands_of_the_documents_run(tmp_path: Path) -> None:
    """Every bash and Python block of every document but the tutorial, which has its own test. CI itself calls
    `make …`."""
    for name in ("recipes", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["LLM2VEC_DS_CACHE"] = str(Path.home() / ".cache" / "llm2vec-ds")
    environment.pop("HF_HUB_OFFLINE", None)
    ran = 0
    for path in (path for path in DOCUMENTS if path.name != "tutorial.md"):
        for language, shell in (
            ("bash", ["bash", "-euo", "pipefail", "-c"]),
            ("python", [sys.executable, "-c"]),
        ):
            for block in blocks(path, language):
                if block.lstrip().startswith("make "):
                    continue
                outcome = subprocess.run(
                    [*shell, block],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert outcome.returncode == 0, f"{path.name}:\n{block}\n{outcome.stderr[-3000:]}"
                ran += 1
    assert ran >= 3
    assert (tmp_path / "runs" / "vectors.npy").exists()
