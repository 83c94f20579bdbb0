"""`python -m llm2vec_ds` and the `llm2vec-ds` command: a user's mistake is one line and exit code 2,
a run that was asked to stop one line and exit code 75."""

from __future__ import annotations

import sys

from llm2vec_ds.errors import NO_SPACE, Stopped, UserError, reason


def main() -> None:
    from llm2vec_ds.cli import app

    try:
        app(prog_name="llm2vec-ds")  # also as `python -m llm2vec_ds`
    except UserError as error:
        print(f"llm2vec-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"llm2vec-ds: {stopped}", file=sys.stderr)
        sys.exit(Stopped.EXIT_CODE)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        print(f"llm2vec-ds: error: {error.filename or 'a file'}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("llm2vec-ds: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
