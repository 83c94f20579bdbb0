"""`python -m llm2vec_ds` and the `llm2vec-ds` command. Each end but success is one line: a user's mistake
with exit code 2, a run that was asked to stop with 75, a command that a signal ends with 128 + its number."""

from __future__ import annotations

import sys

from llm2vec_ds.errors import NO_PLACE, NO_SPACE, Stopped, UserError, is_first_rank, reason, say
from llm2vec_ds.process.interrupts import Interrupted, ignore_ending_signals, interruptible
from llm2vec_ds.process.terminal import say_what_it_can


def main() -> None:
    say_what_it_can()
    with interruptible():
        sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        from llm2vec_ds.cli.app import app

        app(prog_name="llm2vec-ds")  # also as `python -m llm2vec_ds`; leaves by SystemExit
    except UserError as error:
        say(f"llm2vec-ds: error: {error}")
        return 2
    except Stopped as stopped:
        return _said(stopped, Stopped.EXIT_CODE)
    except Interrupted as interrupted:
        return _said(interrupted, interrupted.exit_code)
    except Exception as error:
        if (said := _of_the_machine(error)) is None:
            raise
        say(f"llm2vec-ds: error: {said}")
        return 2
    return 0


def _of_the_machine(error: Exception) -> str | None:
    """Cause and fix of an error of the disk or of a full memory that no command has explained."""
    if isinstance(error, OSError) and error.errno in NO_SPACE + NO_PLACE:
        return f"{error.filename or 'a file'}: {reason(error)}"
    from llm2vec_ds.process.full_memory import full_memory

    which = full_memory(error)
    return which and f"{which} is full: end other programs, or take a machine with more memory"


def _said(ending: BaseException, exit_code: int) -> int:
    """Every rank is asked to end, and one says so."""
    ignore_ending_signals()  # a launcher may still hand on the one that has been heard
    if is_first_rank():
        say(f"llm2vec-ds: {ending}")
    return exit_code


if __name__ == "__main__":
    main()
