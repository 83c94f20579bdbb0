"""Commands in the tests' own process, and what they say where they fail."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llm2vec_ds.__main__ import main


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands behind `llm2vec-ds: error: `, in the last line and in no other."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("llm2vec-ds: error: ")]
    assert len(lines) == 1, error
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    return lines[0].removeprefix("llm2vec-ds: error: ")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `llm2vec-ds ARGUMENTS`."""
    # DeepSpeed remembers a group that was left, and no later run of this process could train.
    monkeypatch.setattr("llm2vec_ds.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("sys.argv", ["llm2vec-ds", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def assert_reads(line: str, expected: str) -> None:
    """`…` in `expected` stands for any words."""
    pattern = ".+".join(re.escape(part) for part in expected.split("…"))
    assert re.fullmatch(pattern, line), f"\n{line}\n{expected}"


@contextmanager
def full_disk(bytes_per_file: int) -> Iterator[None]:
    """No file grows beyond this, so a write fails as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
