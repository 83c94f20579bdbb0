"""`init` writes all that is shipped, and over nothing that a person has changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import load_stages
from llm2vec_ds.start.files import FOLDERS, KEYS, README, shipped, write_to
from tests.support.in_process import error_line, run

ROOT = Path(__file__).resolve().parents[2]


def in_repository() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS, KEYS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git here")
    return listed.stdout.splitlines()


def test_every_file_of_the_repository_is_shipped() -> None:
    assert set(shipped()) >= {README, *in_repository()}


def test_init_writes_what_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(monkeypatch, "init", "~/mine") == 0
    mine = tmp_path / "mine"
    for name in in_repository():
        assert (mine / name).read_bytes() == (ROOT / name).read_bytes()
        assert (mine / name).stat().st_mode & 0o111 == (ROOT / name).stat().st_mode & 0o111, name
    assert "sbatch slurm/train_7b.sh" in (mine / README).read_text()
    monkeypatch.chdir(mine)
    (stage,) = load_stages("recipes/smoke_mntp.yaml")
    assert Path(str(stage.data.path)).is_file()
    script = ["bash", "slurm/train_7b.sh", "--help"]
    assert subprocess.run(script, cwd=mine, capture_output=True, check=False).returncode == 0


def test_what_was_changed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_to(tmp_path)
    site, recipe = tmp_path / "slurm" / "site.env", tmp_path / "recipes" / "smoke_mntp.yaml"
    before = site.read_text()
    site.write_text("mine")
    recipe.unlink()
    assert run(monkeypatch, "init", tmp_path) == 2
    held = f"{tmp_path} holds other content in slurm/site.env"
    assert error_line(capsys) == f"{held}: choose another folder, or replace it with --overwrite"
    assert site.read_text() == "mine"
    assert not recipe.exists()
    assert write_to(tmp_path, overwrite=True) == ["recipes/smoke_mntp.yaml", "slurm/site.env"]
    assert site.read_text() == before
    assert write_to(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_to(tmp_path / "file")
