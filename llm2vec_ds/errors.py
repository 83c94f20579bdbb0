"""The errors that a user reads, and how they are printed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class UserError(Exception):
    """A mistake that the user can fix. It prints as one line with cause and fix, without a traceback."""


class Stopped(Exception):
    """A run was asked to stop. It saved everything, and goes on when it is run again."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turns the system's errors inside into user errors. Use it around code that writes a file or folder.

    Raises:
        UserError: replaces an OSError. It names `what`, the cause and the fix.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {reason(error)}") from None


def say(words: str) -> None:
    """Prints one line to stderr in a single write.

    `print` under a launcher's `python -u` writes the line's end separately. Lines of ranks that fail together
    would then mix. If stderr is closed or its disk is full, only the exit code tells of the failure.
    """
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"{words}\n")
            sys.stderr.flush()


def is_first_rank() -> bool:
    """Returns whether this process prints for all ranks: it is rank 0, or has no launcher."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "")) in ("", "0")


def chain_of(error: BaseException) -> list[BaseException]:
    """Returns the error, then the one that led to it, and so on."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    return chain


def reason(error: OSError) -> str:
    """Returns cause and fix of a system error, in a few words."""
    cause = error.strerror or " ".join(str(error).split())
    # An error without a number comes from a library that wrote fewer bytes than it meant to.
    if error.errno is None or error.errno in NO_SPACE:
        return f"{cause}: free some space, or write to another disk"
    return f"{cause}: choose a path that you can write to"
