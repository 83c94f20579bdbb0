"""Options of earlier versions: whoever gives one is told its name of today."""

from __future__ import annotations

from collections.abc import Sequence

from llm2vec_ds.errors import UserError

RENAMED = {"--micro-batch-tokens": "--max-tokens-per-micro-batch"}


def check_names(arguments: Sequence[str]) -> None:
    """Raises UserError for the first argument that is an option's former name."""
    for argument in arguments:
        if argument == "--":  # what follows is no option
            return
        if now := RENAMED.get(argument.partition("=")[0]):
            raise UserError(f"{argument.partition('=')[0]} is called {now} now: give it that name")
