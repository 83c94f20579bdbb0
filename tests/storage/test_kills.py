"""A folder that is being replaced survives a kill at every file operation: it is the old or the new one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from llm2vec_ds.storage import durable
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.output_folder import MANIFEST, replaced_folder
from tests.faults.operations import Fault, Operations

FORK = multiprocessing.get_context("fork")
KILLED = -9


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2vec_ds.storage.lock.NAMELESS_WAIT_S", 0.01)


OLD, NEW = (dict.fromkeys(("a.txt", "sub/b.txt"), text) for text in ("old", "new"))
OTHERS = {"thesis.tex": "precious", "sub/notes.txt": "mine"}


def write(folder: Path, files: dict[str, str]) -> None:
    with replaced_folder(folder, str(folder)) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def _replace(folder: Path, fault: Fault | None, swaps: bool, seen: Path) -> None:
    if not swaps:
        durable._exchanged = lambda new, old: False
    operations = Operations(fault)
    write(folder, NEW)
    seen.write_text(" ".join(operations.seen))


def replace_in_a_process(folder: Path, fault: Fault | None, swaps: bool, seen: Path) -> int | None:
    process = FORK.Process(target=_replace, args=(folder, fault, swaps, seen))
    process.start()
    process.join()
    return process.exitcode


def make_old(folder: Path) -> None:
    write(folder, OLD)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("swaps", [True, False])
def test_killed_at_every_operation(swaps: bool, tmp_path: Path) -> None:
    make_old(tmp_path / "whole")
    assert replace_in_a_process(tmp_path / "whole", None, swaps, tmp_path / "seen") == 0
    assert contents(tmp_path / "whole") == NEW | OTHERS
    operations = (tmp_path / "seen").read_text().split()
    assert {"mkdir:start", "fsync:start", "link:start", "exchange:start", "unlink:start"} <= set(operations)
    faults = [Fault(0, "kill", n) for n in range(len(operations))]
    faults += [Fault(0, "kill", n, half=True) for n, name in enumerate(operations) if "write" in name]
    outcomes = set()
    for number, fault in enumerate(faults):
        parent = tmp_path / str(number)
        parent.mkdir()
        folder = parent / "out"
        make_old(folder)
        assert replace_in_a_process(folder, fault, swaps, tmp_path / "seen") == KILLED
        if folder.exists() or swaps:  # else killed between three renames, which the next one puts right
            outcomes.add(whole(folder))
        write(folder, NEW)
        assert contents(folder) == NEW | OTHERS
        assert [path.name for path in parent.iterdir()] == ["out"], fault
    assert outcomes == {"old", "new"}


def whole(folder: Path) -> str:
    found = contents(folder)
    assert found in (OLD | OTHERS, NEW | OTHERS)
    return found["a.txt"]


def _take(file: Path, fault: Fault | None, seen: Path) -> None:
    operations = Operations(fault)
    with held(file, "run"):
        operations.phase = "held"
    seen.write_text(" ".join(operations.seen))


def test_a_lock_does_not_outlive_its_process(tmp_path: Path) -> None:
    def take(fault: Fault | None) -> int | None:
        process = FORK.Process(target=_take, args=(tmp_path / "lock", fault, tmp_path / "seen"))
        process.start()
        process.join()
        return process.exitcode

    assert take(None) == 0
    operations = (tmp_path / "seen").read_text().split()
    assert operations == ["pwrite:start", "fsync:start", "unlink:held"]
    for fault in [Fault(0, "kill", 0, half=True), *(Fault(0, "kill", n) for n in range(len(operations)))]:
        assert take(fault) == KILLED
        assert take(None) == 0
        assert not (tmp_path / "lock").exists()
