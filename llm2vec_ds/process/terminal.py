"""Standard output and error on terminals that do not know every character."""

from __future__ import annotations

import sys


def say_what_it_can() -> None:
    """A character that the terminal's encoding lacks is written as an escape, so that nothing ends for it.

    Python raises UnicodeEncodeError there, which could end a command after its work is done. JSON that it
    prints stays JSON: that is escaped already.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="backslashreplace")
