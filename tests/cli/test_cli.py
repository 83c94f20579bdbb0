"""The command line: help that teaches, quick; completion; vectors. Its error lines: test_mistakes_*.py."""

from __future__ import annotations

import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import typer

from llm2vec_ds import __version__
from llm2vec_ds.cli.app import app
from llm2vec_ds.cli.common import quiet_libraries
from llm2vec_ds.encoder.encoder import Encoder
from tests.support.in_process import run
from tests.support.runs import ROOT, command, noise_in, recipe, write_recipe
from tests.support.tiny import sentences

COMMANDS = [
    "init",
    "train",
    "prepare",
    "encode",
    "search",
    "export",
    "mine",
    "score",
    "merge",
    "doctor",
    "demo",
]
HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "mteb", "bitsandbytes", "numpy", "pyarrow")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_shows_examples_and_whole_words(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(monkeypatch, *name.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert f"Usage: llm2vec-ds {name}".rstrip() in shown
    _, examples = shown.split("Examples:")
    assert f"llm2vec-ds {name}".rstrip() in examples
    assert "…" not in shown  # what the console cuts off
    assert max(map(len, shown.splitlines())) <= columns
    if not name:
        assert all(f"│ {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("name", ["", "evaluate", "evaluate mteb", "demo"])
def test_short_help_is_the_same_and_shows_flags_as_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for option in ("-h", "--help"):
        assert run(monkeypatch, *name.split(), option) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "<bool>" not in shown[0]
    if name == "evaluate mteb":
        assert "--causal / --no-causal " in shown[0]


@pytest.mark.parametrize(("options", "shown"), [([], []), (["default"], ["of tomorrow", "old"])])
def test_what_libraries_tell_programmers_is_for_those_who_ask(
    options: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        quiet_libraries()
        warnings.warn("of tomorrow", FutureWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in said] == shown


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"llm2vec-ds {__version__}\n"


@pytest.mark.parametrize(
    ("given", "expected"), [([], False), (["--normalize"], True), (["--no-normalize"], False)]
)
def test_a_flag_can_be_negated(
    given: list[str],
    expected: bool,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.txt").write_text("a trout\n")
    files = ["--input", tmp_path / "a.txt", "--output", tmp_path / "v.npy", "--model", tiny_model_dir]
    assert run(monkeypatch, "encode", *files, *given) == 0
    assert (abs(np.linalg.norm(np.load(tmp_path / "v.npy")) - 1) < 1e-5) == expected


def test_an_error_is_one_write() -> None:
    """So that lines of ranks that fail together stay lines: under `python -u`, as launchers start them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        line = [sys.executable, "-u", "-m", "llm2vec_ds", "train", "none.yaml"]
        outcome = subprocess.run(line, stderr=theirs, cwd=ROOT, check=False)
        ours.settimeout(10)
        said = ours.recv(4096).decode()  # what one write wrote
    assert outcome.returncode == 2
    assert said.startswith("llm2vec-ds: error: recipe none.yaml cannot be read")
    assert said.endswith("\n")


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"], ids=["full disk", "closed"])
def test_an_error_that_cannot_be_said_keeps_its_exit_code(stderr: str) -> None:
    line = f"{sys.executable} -u -m llm2vec_ds train none.yaml {stderr}"
    assert subprocess.run(["bash", "-c", line], cwd=ROOT, check=False).returncode == 2


@pytest.mark.parametrize(
    "words", [None, ["--help"], ["train", "--help"], ["demo", "--help"], ["train", "none.yaml"]], ids=str
)
def test_what_should_be_quick_loads_nothing_heavy(words: list[str] | None) -> None:
    """Rather than a time, which a busy machine would break: the modules that take it."""
    work = f"sys.argv = {['llm2vec-ds', *(words or [])]}; from llm2vec_ds.__main__ import main; main()"
    code = (
        "import atexit, sys;"
        f"atexit.register(lambda: print('loaded:', [m for m in {HEAVY} if m in sys.modules]));"
        + ("import llm2vec_ds" if words is None else work)
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert outcome.stdout.splitlines()[-1] == "loaded: []", outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("llm2vec-ds pre", {"prepare"}),
        ("llm2vec-ds encode --no-", {"--no-normalize"}),
        ("llm2vec-ds encode --inst", {"--instruction"}),
        ("llm2vec-ds train r.yaml optimizer.w", {"optimizer.weight_decay=", "optimizer.warmup_steps="}),
    ],
)
def test_the_shell_completes_commands_options_and_recipe_keys(
    typed: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LLM2VEC_DS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert run(monkeypatch) == 0
    assert set(capsys.readouterr().out.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_its_completion_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LLM2VEC_DS_COMPLETE", f"source_{shell}")
    assert run(monkeypatch) == 0
    script = capsys.readouterr().out
    assert "llm2vec-ds" in script
    assert f"_LLM2VEC_DS_COMPLETE=complete_{shell}" in script


def test_encode_writes_the_vectors_of_the_encoder(tmp_path: Path, tiny_model_dir: Path) -> None:
    texts = sentences(9)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    files = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out" / "v.npy")]
    outcome = command(["encode", "--model", str(tiny_model_dir), *files, "--instruction", "bread"])
    assert outcome.returncode == 0, outcome.stderr
    assert not noise_in(outcome.stderr)
    assert "bidirectional attention by" in outcome.stderr
    expected = Encoder.from_pretrained(tiny_model_dir).encode(texts, instruction="bread")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "v.npy"), expected, atol=1e-5)


NAMED_BY_WORDS = {
    "model",
    "input",
    "pairs",
    "corpus",
    "texts",
    "original",
    "instructions",
    "words.train",
    "words.test",
}
"""Options that are strings, because they may also be a hub id, and name a place."""


def _places(commands: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Name and option of everything that names a place."""
    for group in commands.registered_groups:
        yield from _places(group.typer_instance or typer.Typer())
    for registered in commands.registered_commands:
        assert registered.callback is not None
        for name, hint in get_type_hints(registered.callback, include_extras=True).items():
            full_name = f"{registered.callback.__name__}.{name}"
            if "Path" in str(hint) or {name, full_name} & NAMED_BY_WORDS:
                annotated = hint if hasattr(hint, "__metadata__") else get_args(hint)[0]
                yield full_name, annotated.__metadata__[0]


PLACES = dict(_places(app))


def test_places_are_found() -> None:
    assert {"encode.output", "encode.model", "export.source", "words.train", "train.recipe"} <= PLACES.keys()
    assert len(PLACES) > 25


@pytest.mark.parametrize("name", PLACES)
def test_home_is_a_tilde_in_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    assert PLACES[name].callback(Path("~/x")) == Path("/home/of/x")
    assert PLACES[name].callback(["~/x", "b"]) == ["/home/of/x", "b"]
    assert PLACES[name].callback(None) is None


def test_home_is_a_tilde_in_recipes_and_no_folder_is_called_so(
    tmp_path: Path, tiny_model_dir: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text(texts_file.read_text())
    values = recipe("simcse", tiny_model_dir, Path("~/texts.txt"), Path("~/run"))
    values["data"]["prepared_dir"] = "~/prepared"
    write_recipe(values, tmp_path / "r.yaml")
    assert run(monkeypatch, "prepare", "~/r.yaml") == 0
    assert run(monkeypatch, "train", "~/r.yaml", "output_dir=~/other", "max_steps=2") == 0
    assert {"prepared", "other"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.rglob("~*"))


def test_launchers_put_local_rank_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--local_rank=0", "train", "none.yaml") == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
