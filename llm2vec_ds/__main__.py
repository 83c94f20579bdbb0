"""`python -m llm2vec_ds` and the `llm2vec-ds` command: a user's mistake is one line and exit code 2,
a run that was asked to stop one line and exit code 75."""

from __future__ import annotations

import sys

from llm2vec_ds.errors import NO_PLACE, NO_SPACE, Stopped, UserError, reason, say


def main() -> None:
    from llm2vec_ds.cli import app

    try:
        app(prog_name="llm2vec-ds")  # also as `python -m llm2vec_ds`
    except UserError as error:
        say(f"llm2vec-ds: error: {error}")
        sys.exit(2)
    except Stopped as stopped:
        say(f"llm2vec-ds: {stopped}")
        sys.exit(Stopped.EXIT_CODE)
    except OSError as error:
        if error.errno not in NO_SPACE + NO_PLACE:
            raise
        say(f"llm2vec-ds: error: {error.filename or 'a file'}: {reason(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("llm2vec-ds: stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
