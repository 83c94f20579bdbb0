"""The one error that a user is meant to read, and how it is said."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class UserError(Exception):
    """A mistake that the user can fix: one line with the cause and the fix, no traceback."""


class Stopped(Exception):
    """A run that ended early because it was asked to, with everything saved: it goes on when run again."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Around the writing of a file or folder: what the system refuses is the user's to fix.

    Raises:
        UserError: in place of an OSError; names `what`, the cause and the fix.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {reason(error)}") from None


def say(words: str) -> None:
    """One line on stderr in one write: under a launcher's `python -u`, `print` takes a second one for the
    line's end, and lines of ranks that fail together run into each other. Where it cannot be written (a full
    disk, or closed), the exit code has to say it."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"{words}\n")
            sys.stderr.flush()


def is_first_rank() -> bool:
    """Whether this process speaks for all of its launcher's: rank 0, or a process that has no launcher."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "")) in ("", "0")


def reason(error: OSError) -> str:
    """Cause and fix of a refusal, in a few words."""
    cause = error.strerror or " ".join(str(error).split())
    # Without a number: a library that found fewer bytes written than it asked for.
    if error.errno is None or error.errno in NO_SPACE:
        return f"{cause}: free some space, or write to another disk"
    return f"{cause}: choose a path that you can write to"
