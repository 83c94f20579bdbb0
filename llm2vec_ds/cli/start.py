"""The command `init`: wiring only."""

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


@kept("written files stay; run the same command again")
def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder to write to. Default: the current folder.", callback=expanded)
    ] = Path(),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that you have changed.")
    ] = False,
) -> None:
    """Write recipes, DeepSpeed configs, SLURM scripts and a README into a folder.

    If a file is there with other content, nothing is written, unless you give --overwrite.
    """
    from llm2vec_ds.start.files import README, write_to

    written = write_to(folder, overwrite=overwrite)
    logging.getLogger("llm2vec_ds").info("%s: wrote %s files. Begin with %s", folder, len(written), README)
