"""Servers of others for the length of a test, and what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

GUARD = Path(__file__).with_name("guard.py")
START_S = 300
"""A server that imports torch on busy cores takes a minute or two; one that hangs is ended."""


@contextmanager
def guarded(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that ends with the block, or with this process, and its children with it."""
    line = [sys.executable, str(GUARD), *command]
    with (
        log.open("wb") as said,
        subprocess.Popen(
            line,
            env=environment,
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as guard,
    ):
        try:
            yield guard
        finally:
            all_of_it = psutil.Process(guard.pid).children(recursive=True) if guard.poll() is None else []
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait()
            assert not psutil.wait_procs(all_of_it, timeout=5)[1], "a server outlived its test"


@contextmanager
def serving(command: list[str], environment: dict[str, str], log: Path, port: int) -> Iterator[str]:
    """The address of a server that answers at `/health`, or the end of its log as an error."""
    address = f"http://127.0.0.1:{port}"
    with guarded(command, environment, log) as server:
        until = time.monotonic() + START_S
        while not _is_there(f"{address}/health"):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not serve: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield address


def _is_there(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, **question: Any) -> dict[str, Any]:
    """POSTs JSON and returns the answer's; of a refusal the status and what was said."""
    request = urllib.request.Request(
        address, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as refusal:
        return {"status": refusal.code, "said": refusal.read().decode(errors="replace")}


def embedded(address: str, texts: list[str], model: str, **how: Any) -> np.ndarray:
    """Vectors by OpenAI's `/embeddings`, `[N, D]`."""
    answer = ask(address, input=texts, model=model, **how)
    assert "data" in answer, answer
    return np.array([item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])])
