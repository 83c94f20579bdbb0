"""A folder is replaced whole, and nothing that others put into it is lost."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage import durable
from llm2vec_ds.storage.output_folder import (
    MANIFEST,
    check_no_foreign,
    check_reads_no_output,
    check_replaceable,
    replaced_folder,
)


def write(folder: Path, content: str = "new", names: tuple[str, ...] = ("a.txt", "sub/b.txt")) -> None:
    with replaced_folder(folder, f"folder {folder.name}") as new:
        for name in names:
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(content)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


@pytest.fixture(params=["swap", "three renames"])
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "three renames":
        monkeypatch.setattr(durable, "_exchanged", lambda new, old: False)


@pytest.mark.usefixtures("any_file_system")
def test_only_what_was_written_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "old", names=("a.txt", "old.txt", "sub/b.txt"))
    (folder / "thesis.tex").write_text("precious")
    (folder / "sub" / "notes").mkdir()
    (folder / "sub" / "notes" / "n.txt").write_text("mine")
    (folder / "link").symlink_to("thesis.tex")
    (folder / "empty").mkdir()
    write(folder)
    assert files(folder) == {
        "a.txt": "new",
        "sub/b.txt": "new",
        "thesis.tex": "precious",
        "sub/notes/n.txt": "mine",
        "link": "precious",
    }
    assert (folder / "link").readlink() == Path("thesis.tex")
    assert (folder / "empty").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(folder)  # what was taken along does not count as written
    assert (folder / "thesis.tex").read_text() == "precious"


def test_a_foreign_file_of_the_same_name_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", names=("a.txt",))
    (tmp_path / "out" / "b.txt").write_text("precious")
    with pytest.raises(UserError, match=r"folder out holds b\.txt, which this toolkit did not write"):
        write(tmp_path / "out", names=("a.txt", "b.txt"))
    assert files(tmp_path / "out") == {"a.txt": "new", "b.txt": "precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")

    def write_half() -> None:
        with replaced_folder(tmp_path / "out", "out") as new:
            (new / "a.txt").write_text("new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert set(files(tmp_path / "out").values()) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"files": 3}', '{"files": [3]}', "[" * 5000])
def test_a_folder_without_its_manifest_is_anothers(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST).write_text(damage)
    with pytest.raises(UserError, match="holds files, but no encoder or export of this toolkit"):
        write(tmp_path / "out")
    assert set(files(tmp_path / "out").values()) == {"old"}


def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "thesis.tex").write_text("precious")
    values = json.loads((tmp_path / "out" / MANIFEST).read_text())
    values["files"].append("../thesis.tex")
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(values))
    write(tmp_path / "out")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_places_that_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work" / "deep"
    home.mkdir()
    work.mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "round").symlink_to("round")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    for folder, reason in {
        "/": "is the root of the file system",
        ".": "is or holds the folder you are in",
        "..": "is or holds the folder you are in",
        str(tmp_path): "is or holds your home folder",
        "~": "is or holds your home folder",
        "~no-such-user/x": "give another path",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "full"): "holds files, but no encoder or export",
        str(tmp_path / "round"): "give another path",
        str(tmp_path / "disk"): "is a mount point",
    }.items():
        with pytest.raises(UserError, match=f"OUT.*{reason}"):
            check_replaceable(Path(folder), "OUT")
    assert check_replaceable(Path("~/new"), "OUT") == home / "new"
    assert check_replaceable(Path("new"), "OUT") == work / "new"


@pytest.mark.parametrize("output", ["run", "run/encoder", ""])
def test_a_folder_that_holds_its_source_is_refused(output: str, tmp_path: Path) -> None:
    write(tmp_path / "run" / "encoder")
    with pytest.raises(UserError, match="holds .*encoder, which is an input: choose another folder"):
        check_replaceable(tmp_path / output, "OUT", [tmp_path / "run" / "encoder"])


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "old")
    write(tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("real")
    assert set(files(tmp_path / "real").values()) == {"new"}


def test_what_version_0_1_wrote_is_replaced(tmp_path: Path) -> None:
    """It wrote no manifest, but its version into its settings, and files of known names."""
    folder = tmp_path / "encoder"
    (folder / "adapters").mkdir(parents=True)
    own = ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "adapters/0.safetensors")
    for name in own:
        (folder / name).write_text("old")
    (folder / "llm2vec_ds.json").write_text('{"llm2vec_ds_version": "0.1.0"}')
    (folder / "thesis.tex").write_text("precious")
    write(folder, names=("config.json",))
    assert files(folder) == {"config.json": "new", "thesis.tex": "precious"}


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Those of version 0.1 only where they hold nothing else."""
    folder = tmp_path / "out"
    for name in (
        ".out.unfinished-0123abcd",
        ".out.0123abcd",
        ".out.1123abcd",
        ".out.backup",
        ".other.0123abcd",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / ".out.unfinished-0123abcd.lock").write_text("")
    (tmp_path / ".out.1123abcd" / "thesis.tex").write_text("precious")
    write(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.0123abcd",
        ".out.1123abcd",
        ".out.backup",
        "out",
    ]


def test_a_folder_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with replaced_folder(folder, "first") as first:
        (first / "a.txt").write_text("first")
        write(folder, "second")
        assert (first / "a.txt").exists()
        assert set(files(folder).values()) == {"second"}
    assert files(folder) == {"a.txt": "first"}


def test_a_kill_between_three_renames_is_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    write(folder, "old")
    left = tmp_path / ".out.unfinished-0123abcd"
    folder.rename(durable.aside_of(left))
    left.mkdir()
    (tmp_path / f"{left.name}.lock").touch()
    monkeypatch.setattr("llm2vec_ds.storage.lock.NAMELESS_WAIT_S", 0.01)
    with pytest.raises(ZeroDivisionError), replaced_folder(folder, "out"):
        1 / 0  # noqa: B018
    assert set(files(folder).values()) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_folder_with_a_mark_is_written_over(tmp_path: Path) -> None:
    check_no_foreign(tmp_path / "new", "OUT", ["texts.txt"], ["runs"])
    (tmp_path / "other.txt").touch()
    check_no_foreign(tmp_path, "OUT", ["texts.txt"], ["runs"])
    (tmp_path / "texts.txt").touch()
    with pytest.raises(UserError, match=re.escape("OUT holds texts.txt, which would be overwritten")):
        check_no_foreign(tmp_path, "OUT", ["texts.txt"], ["runs"])
    (tmp_path / "runs").mkdir()
    check_no_foreign(tmp_path, "OUT", ["texts.txt"], ["runs"])


def test_an_input_is_known_under_its_other_names(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "soft").symlink_to("in.jsonl")
    (tmp_path / "hard").hardlink_to(tmp_path / "in.jsonl")
    for name in ("in.jsonl", "soft", "hard", f"../{tmp_path.name}/in.jsonl"):
        with pytest.raises(UserError, match="which is an input: choose another output"):
            check_reads_no_output([tmp_path / name], [tmp_path / "in.jsonl"], "--output")
    check_reads_no_output([tmp_path / "out"], [tmp_path / "in.jsonl", tmp_path / "missing"], "--output")
