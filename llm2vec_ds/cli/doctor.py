"""The command `doctor`: wiring only."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from llm2vec_ds.cli.common import examples, quiet_libraries
from llm2vec_ds.errors import UserError


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(epilog=examples("doctor", "doctor --no-check"))(doctor)


def doctor(
    check: Annotated[
        bool, typer.Option(help="Also train one step on a tiny model. Takes about ten seconds.")
    ] = True,
) -> None:
    """Check this machine: what it has, what a run would use, and how to get what is missing.

    ✓: it is there. !: some runs need it. ·: optional. ✗: no run is possible without it.
    """
    quiet_libraries()
    from llm2vec_ds.doctor import examine, training_check

    blocked = False
    findings = examine()
    for finding in itertools.chain(findings, (run() for run in [training_check] if check and not blocked)):
        fix = f"  → {finding.fix}" if finding.fix else ""
        print(f"{finding.mark} {finding.name:15} {finding.value}{fix}", flush=True)
        blocked |= finding.blocks
    if blocked:
        raise UserError("no run is possible here yet: see the lines marked ✗")
