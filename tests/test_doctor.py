"""`llm2vec-ds doctor` says what is there, what is missing and how to get it, and whether a step trains."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2vec_ds import doctor
from llm2vec_ds.__main__ import main
from tests.support.runs import command


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["llm2vec-ds", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in packages else find(name))


def test_the_whole_report_as_a_user_sees_it(tmp_path: Path) -> None:
    outcome = command(["doctor"])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "WARNING" not in outcome.stdout + outcome.stderr
    assert all(line[:2] in ("✓ ", "! ", "· ") for line in outcome.stdout.splitlines())
    assert f"✓ torch           {torch.__version__}" in outcome.stdout
    assert re.search(r"✓ a run uses +(fp32|bf16), attention by \w+", outcome.stdout)
    assert re.search(r"✓ training check +one step, loss \d+\.\d\d, \d+ ms$", outcome.stdout)


def test_what_blocks_is_marked_and_no_step_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "peft", "wandb")
    monkeypatch.setattr(doctor, "training_check", lambda: pytest.fail("tried a step"))
    assert report(monkeypatch) == 2
    shown = capsys.readouterr()
    assert "✗ peft            not installed  → pip install peft\n" in shown.out
    assert "· wandb           not installed  → pip install 'llm2vec-ds[monitor]'" in shown.out
    assert shown.err == "llm2vec-ds: error: no run is possible here yet: see the lines marked ✗\n"


def test_without_torch_the_rest_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["torch"].blocks
    assert "a run uses" not in findings
    assert "launcher" in findings


def test_a_cache_that_cannot_be_written_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(tmp_path / "a" / "b"))
    found = next(finding for finding in doctor.examine() if finding.name == "cache")
    assert found.mark == "✗"
    assert (found.value, found.fix) == (
        f"{tmp_path / 'a' / 'b'} is not writable",
        "set LLM2VEC_DS_CACHE to a folder of yours",
    )


def test_little_space_is_said_and_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    found = next(finding for finding in doctor.examine() if finding.name == "cache")
    assert (found.mark, found.blocks) == ("!", False)
    assert found.value.endswith("1 GiB free")


def test_a_failing_step_names_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run = doctor._tiny_run

    def spoilt(folder: Path) -> Path:
        recipe = tiny_run(folder)
        (folder / "texts.txt").write_text("\n")
        return recipe

    monkeypatch.setattr(doctor, "_tiny_run", spoilt)
    found = doctor.training_check()
    assert found.blocks
    assert re.fullmatch(r"failed: .*texts.txt: no text in it \(1 blank\)", found.value)
    assert found.fix


def test_a_step_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired("train", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    found = doctor.training_check()
    assert (found.value, found.blocks) == ("failed: it did not end within 300 s", True)
