"""What the site adds to the pages of docs/: the command line, files beside docs/, links that lead to them.

mkdocs calls the functions `on_…` (https://www.mkdocs.org/user-guide/configuration/#hooks).
"""

from __future__ import annotations

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from llm2vec_ds.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
NAME = "llm2vec-ds"
PROJECT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files beside docs/ that are pages of the site."""
LINK = re.compile(r"\]\(([^)#\s]+)")
NAMED_FENCE = re.compile(r"^```(\w+) ([\w.]+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of commands, the pages of the project, and a copy of each linked file beside docs/."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    for name, page in PROJECT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            name = linked_file(target, page.src_uri)
            if name and name not in PROJECT_PAGES and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files beside docs/ lead to their copies. The second word of a block's fence is its title."""

    def in_site(match: re.Match[str]) -> str:
        target = match[1]
        if target.startswith("docs/"):  # in CHANGELOG.md and CONTRIBUTING.md
            return f"]({target.removeprefix('docs/')}"
        name = linked_file(target, page.file.src_uri)
        return f"]({PROJECT_PAGES.get(name, name)}" if name else match[0]

    return NAMED_FENCE.sub(r'```\1 title="\2"', LINK.sub(in_site, markdown))


def linked_file(target: str, page: str) -> str | None:
    """Path, from the repository's root, of a linked file that is not in docs/; None for every other link."""
    if page in PROJECT_PAGES.values():
        is_beside = "://" not in target and not target.startswith("docs/")
        return target if is_beside else None
    return target.removeprefix("../") if target.startswith("../") else None


def command_line() -> str:
    """The page of all commands and options, as Typer writes them."""
    program = typer.main.get_command(app)
    context = typer.Context(program, info_name=NAME)
    commands = [program.get_command(context, name) for name in program.list_commands(context)]
    rows, sections = [], []
    for command in commands:
        summary = " ".join(command.help.partition("\n\n")[0].split())
        rows.append(f"| [`{command.name}`](#{NAME}-{command.name}) | {summary} |")
        sections.append(get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix=NAME))
    intro = f"# Command line\n\n`{NAME} --help` and `{NAME} COMMAND --help` print the same in a terminal."
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    return "\n\n".join([intro, table, *sections])
