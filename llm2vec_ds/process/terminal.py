"""Makes standard output and error work on terminals that cannot show every character."""

from __future__ import annotations

import sys


def say_what_it_can() -> None:
    """Writes characters that the terminal's encoding lacks as escapes.

    Python would raise UnicodeEncodeError, which could end a command after its work is done. Printed JSON
    stays valid, because it is already escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="backslashreplace")
