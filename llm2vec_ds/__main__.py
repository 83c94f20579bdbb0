"""`python -m llm2vec_ds` and the `llm2vec-ds` command.

A command that does not succeed ends with one line. Its exit code is 2 for a mistake of the user, 75 for a
run that was asked to stop, and 128 + the signal's number for a command that a signal ended.
"""

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

        app(prog_name="llm2vec-ds")  # the same name under `python -m llm2vec_ds`; raises SystemExit
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
    """Explains a disk or memory error that no command caught: cause and fix, or None for other errors."""
    if isinstance(error, OSError) and error.errno in NO_SPACE + NO_PLACE:
        return f"{error.filename or 'a file'}: {reason(error)}"
    from llm2vec_ds.process.full_memory import full_memory

    which = full_memory(error)
    return which and f"{which} is full: end other programs, or use a machine with more memory"


def _said(ending: BaseException, exit_code: int) -> int:
    """Prints why the command ended. Every rank ends, but only the first one prints."""
    ignore_ending_signals()  # a launcher may forward the same signal again
    if is_first_rank():
        say(f"llm2vec-ds: {ending}")
    return exit_code


if __name__ == "__main__":
    main()
