"""The command line. Each group of commands is one file. Heavy imports wait until a command runs."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from llm2vec_ds import __version__
from llm2vec_ds.cli import (
    ablate,
    demo,
    doctor,
    evaluate,
    export,
    mining,
    plan,
    score,
    start,
    train,
    vectors,
)
from llm2vec_ds.cli.common import examples
from llm2vec_ds.cli.help import Group, show_flags
from llm2vec_ds.errors import is_first_rank

app = typer.Typer(
    name="llm2vec-ds",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a decoder-only LLM into a text encoder: bidirectional attention, MNTP, contrastive training."
    "\n\nBegin with `doctor` and `demo`. Then `init` writes recipes, and `train` runs one. "
    "`llm2vec-ds COMMAND --help` explains a command.",
    epilog=examples(
        "doctor",
        "demo --budget quick",
        "train recipes/smoke_mntp.yaml max_steps=5",
        "--install-completion",
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


# Their subcommands inherit `-h` from the app.
for _commands in (doctor, demo, start, train, plan, evaluate, vectors, mining, score, export, ablate):
    _commands.register(app)
show_flags(app)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llm2vec-ds {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True, help="Set by launchers.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Log details too, such as environment variables set for libraries."),
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shown = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("llm2vec_ds").setLevel(shown if is_first_rank() else logging.WARNING)
