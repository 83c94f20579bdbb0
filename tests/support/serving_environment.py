"""One environment for each server of `tests/serving/servers.toml`, kept below the temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm2vec_ds.storage.lock import held

SERVERS = Path(__file__).resolve().parents[1] / "serving" / "servers.toml"


class CannotInstallError(Exception):
    """pip's last words."""


def described(server: str) -> dict[str, Any]:
    """What `servers.toml` says of it."""
    found: dict[str, Any] = tomllib.loads(SERVERS.read_text(encoding="utf-8"))[server]
    return found


@cache
def environment(server: str) -> Path:
    """The `bin` of its environment, which is made where it is missing or half made.

    Raises:
        CannotInstallError: a wheel is missing, or does not fit this Python.
    """
    said = described(server)
    key = sha256(json.dumps([said, sys.version]).encode()).hexdigest()[:12]
    folder = _own_folder() / f"{server}-{key}"
    with held(Path(f"{folder}.lock"), f"the environment of {server}", wait=True):
        if not (folder / "installed").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, said)
            (folder / "installed").touch()
    return folder / "bin"


def version(server: str) -> str:
    """Of its package, as installed."""
    code = f"from importlib.metadata import version; print(version({described(server)['package']!r}))"
    return _run(environment(server) / "python", "-c", code).strip()


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's, without what leads into this checkout or its own environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")}
    return {**kept, "HF_HUB_OFFLINE": "1", **variables}


def _own_folder() -> Path:
    """Others may write to the temporary folder, so this one has to be this user's."""
    folder = Path(tempfile.gettempdir()) / f"llm2vec-ds-serving-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CannotInstallError(f"{folder} belongs to another user")
    return folder


def _make(folder: Path, said: dict[str, Any]) -> None:
    _run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip"]
    for packages in said["install"]:
        _run(*pip, "install", "--quiet", "--disable-pip-version-check", *packages)
    if said["remove"]:
        _run(*pip, "uninstall", "--quiet", "--yes", *said["remove"])


def _run(*command: object) -> str:
    words = list(map(str, command))
    outcome = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=False)
    if outcome.returncode:
        said = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotInstallError(f"{' '.join(words[1:])}: {said[-1] if said else outcome.stderr[-500:]}")
    return outcome.stdout
