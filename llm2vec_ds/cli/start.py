"""`init`: wiring only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_ds.cli.common import examples, expanded
from llm2vec_ds.process.interrupts import kept


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(epilog=examples("init", "init my-encoder"))(init)


@kept("what is written stays, run the same command again")
def init(
    folder: Annotated[
        Path, typer.Argument(help="Where to write; default: the current folder.", callback=expanded)
    ] = Path(),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that differ from what is shipped.")
    ] = False,
) -> None:
    """Write recipes, DeepSpeed's JSONs and SLURM's scripts into a folder, with a README.

    Nothing that is there and differs is replaced without --overwrite.
    """
    from llm2vec_ds.start.files import README, write_to

    written = write_to(folder, overwrite=overwrite)
    logging.getLogger("llm2vec_ds").info("%s: %s files written, begin with %s", folder, len(written), README)
