"""A run's folder tells the truth: whose it is, which run is in it, whether its encoder is of that run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_ds import UserError
from llm2vec_ds.encoder.of_run import check_is_of_finished_run, is_finished
from llm2vec_ds.engine import run as engine_run
from llm2vec_ds.engine.run import train
from llm2vec_ds.engine.run_folder import check_run_folder
from llm2vec_ds.engine.run_stages import train_stages
from llm2vec_ds.errors import Stopped
from llm2vec_ds.export.export import ExportOptions, export
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.output_folder import MANIFEST
from tests.support.runs import recipe
from tests.support.tiny import sentences


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def values(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, texts_file: Path
) -> dict[str, Any]:
    """The recipe of a short run, with `model` and `texts` in a folder of their own."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = recipe("simcse", tiny_model_dir, texts_file, folder, max_steps=3)
    values["optimizer"]["warmup_steps"] = 1  # some runs are of one step
    return values


@pytest.fixture(scope="module")
def finished_run(values: dict[str, Any]) -> Path:
    """Without a checkpoint."""
    return train(parse_recipe(values))


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def changed(values: dict[str, Any], **changes: Any) -> Recipe:
    return parse_recipe({**values, **changes})


# Whose folder is it?


@pytest.mark.parametrize(
    "name", ["encoder", "checkpoints", "monitor", "metrics.jsonl", "recipe.yaml", "finished", "notes.txt"]
)
@pytest.mark.parametrize("mode", [{}, {"overwrite": True}, {"resume": True}])
def test_what_others_wrote_is_not_touched(
    name: str, mode: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    own = tmp_path / "out" / name
    file = own / "thesis.tex" if name in ("encoder", "checkpoints", "monitor") else own
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    before = contents(tmp_path)
    if name == "notes.txt":  # a name that no run writes
        check_run_folder(changed(values, output_dir=str(tmp_path / "out"), **mode), tmp_path / "out")
    else:
        with pytest.raises(
            UserError, match=f"out holds {name}, which no run wrote: choose another output_dir"
        ):
            train(changed(values, output_dir=str(tmp_path / "out"), **mode))
    assert contents(tmp_path) == before


def test_overwrite_deletes_what_the_run_wrote_alone(values: dict[str, Any], finished: Path) -> None:
    own = {
        "notes.txt": "a",
        "encoder/notes.txt": "b",
        "checkpoints/notes.txt": "c",
        "monitor/csv/own.csv": "d",
    }
    for name, text in own.items():
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_text(text)
    (finished / "checkpoints" / "step-00000001").mkdir()
    (finished / "monitor" / "csv" / "train_loss.csv").touch()
    train(changed(values, output_dir=str(finished), overwrite=True, max_steps=1))
    assert {name: (finished / name).read_text() for name in own} == own
    assert not (finished / "checkpoints" / "step-00000001").exists()
    assert not (finished / "monitor" / "csv" / "train_loss.csv").exists()
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 1
    assert is_finished(finished)


@pytest.mark.parametrize("place", [".", "model", "run/encoder"])
def test_a_model_in_its_own_output_dir_is_refused(
    place: str, values: dict[str, Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    model = tmp_path / "run" / "encoder" if place == "run/encoder" else tmp_path / "run" / place
    shutil.copytree(tiny_model_dir, model)
    before = contents(tmp_path)
    own = changed(values, output_dir=str(tmp_path / "run"), model={"path": str(model)}, overwrite=True)
    with pytest.raises(UserError, match="run holds model.path .*, which training reads"):
        train(own)
    assert contents(tmp_path) == before


# Which run is in it?


def test_what_a_killed_run_had_not_finished_writing_goes(values: dict[str, Any], finished: Path) -> None:
    """It was killed while it wrote its last file, so that nothing is left to do."""
    (finished / ".memory.json.new").write_text('{"planned_pe')
    (finished / ".thesis.new").write_text("mine")
    train(changed(values, output_dir=str(finished), resume=True))
    assert not (finished / ".memory.json.new").exists()
    assert (finished / ".thesis.new").exists()


def test_a_finished_run_is_known_by_its_recipe_data_and_model(
    values: dict[str, Any],
    finished: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`resume=true` leaves it alone where all are the same, and names what is not, also at other places."""
    other_texts = tmp_path / "other.txt"
    other_texts.write_text("\n".join(sentences(64, seed=5)) + "\n")
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    same = {"output_dir": str(finished), "resume": True, "model": {"path": str(model)}}
    before = contents(finished)
    with caplog.at_level("INFO"):
        train(changed(values, **same))
    assert "finished already, nothing to do" in caplog.text
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    mntp = {key: value for key, value in values.items() if key != "simcse"} | {"stage": "mntp", **same}
    for words, other in {
        "max_steps was 3, now 2": changed(values, **same, max_steps=2),
        "optimizer.lr was 0.001, now 0.01": changed(
            values, **same, optimizer={"lr": 1e-2, "warmup_steps": 2}
        ),
        "the training data have changed": changed(
            values, **same, data={"path": str(other_texts), "max_tokens": 64}
        ),
        "stage was simcse, now mntp": parse_recipe(mntp),
        "the model to start from has changed": changed(values, **same),
    }.items():
        if words.startswith("the model"):
            weights.write_bytes(content)
        with pytest.raises(UserError, match=f"run holds another run .*{words}"):
            train(other)
    assert contents(finished) == before


def test_force_does_not_replace_a_finished_run_without_a_checkpoint(
    values: dict[str, Any], finished: Path
) -> None:
    before = contents(finished)
    with pytest.raises(UserError, match="run holds another run .max_steps was 3, now 2."):
        train(changed(values, output_dir=str(finished), resume="force", max_steps=2))
    assert contents(finished) == before


def test_a_killed_run_of_something_else_is_not_replaced(values: dict[str, Any], finished: Path) -> None:
    """Also before its first checkpoint."""
    (finished / "finished").unlink()
    shutil.rmtree(finished / "encoder")
    before = contents(finished)
    with pytest.raises(UserError, match="run holds another run .seed was 42, now 7."):
        train(changed(values, output_dir=str(finished), resume=True, seed=7))
    assert contents(finished) == before
    train(changed(values, output_dir=str(finished), resume=True))
    assert is_finished(finished)


def test_of_version_0_1_the_recipe_is_compared(values: dict[str, Any], finished: Path) -> None:
    """It wrote no run.json, no manifest, and the number of steps into `finished`."""
    (finished / "run.json").unlink()
    (finished / "encoder" / MANIFEST).unlink()
    (finished / "finished").write_text("3\n")
    before = contents(finished)
    train(changed(values, output_dir=str(finished), resume=True))
    with pytest.raises(UserError, match="seed was 42, now 7"):
        train(changed(values, output_dir=str(finished), resume=True, seed=7))
    assert contents(finished) == before
    train(changed(values, output_dir=str(finished), overwrite=True, max_steps=1))
    assert is_finished(finished)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"identity": 3}', '{"identity": {"recipe": {}}}', "[" * 5000]
)
def test_a_damaged_run_json_is_named(damage: str, values: dict[str, Any], finished: Path) -> None:
    (finished / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"run\.json is damaged .*: restore it, choose another output_dir"):
        train(changed(values, output_dir=str(finished), resume=True))


# Is its encoder of that run?


@pytest.mark.parametrize("changes", [{"pooling": "last"}, {}], ids=["another recipe", "the same"])
def test_an_encoder_of_an_earlier_run_is_not_used(
    changes: dict[str, Any],
    values: dict[str, Any],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that begins over another, and fails, leaves that one's encoder."""

    def fails(*_: Any) -> None:
        raise UserError("a disk has burnt")

    with monkeypatch.context() as failing:
        failing.setattr(engine_run.Trainer, "run", fails)
        with pytest.raises(UserError, match="a disk has burnt"):
            train(changed(values, output_dir=str(finished), overwrite=True, **changes))
    assert (finished / "encoder" / "config.json").exists()
    for source in (finished, finished / "encoder"):
        with pytest.raises(
            UserError, match="encoder does not belong to the run in .*run, which has not finished"
        ):
            export(source, tmp_path / "exported", ExportOptions())
    next_stage = changed(values, output_dir=str(tmp_path / "next"), model={"path": str(finished / "encoder")})
    with pytest.raises(
        UserError, match="encoder does not belong to the run in .*run, which has not finished"
    ):
        train(next_stage)
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "next").exists()


def test_marks_that_do_not_fit(finished: Path) -> None:
    assert is_finished(finished)
    check_is_of_finished_run(finished / "encoder")
    mark = json.loads((finished / "finished").read_text())
    for content in ("", "{", "3", json.dumps({**mark, "identity_sha256": "0" * 64})):
        (finished / "finished").write_text(content)
        assert not is_finished(finished), content
    (finished / "finished").write_text(json.dumps(mark))
    shutil.rmtree(finished / "encoder")
    assert not is_finished(finished)


def test_a_finished_stage_of_several_is_left_alone_or_refused(
    values: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    first = changed(values, output_dir=str(finished))
    second = changed(values, output_dir=str(tmp_path / "second"), model={"path": str(finished / "encoder")})
    before = contents(finished)
    train_stages([first, second])
    assert contents(finished) == before
    assert is_finished(tmp_path / "second")
    with pytest.raises(UserError, match="run holds another run .seed was 42, now 7."):
        train_stages([first.model_copy(update={"seed": 7}), second])


def test_a_stop_in_the_last_step_of_a_stage_is_meant_for_all(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That stage finishes, the next one does not begin."""
    first = changed(values, output_dir=str(tmp_path / "first"), max_steps=1)
    second = changed(
        values,
        output_dir=str(tmp_path / "second"),
        model={"path": str(tmp_path / "first/encoder")},
        max_steps=1,
    )
    with monkeypatch.context() as asking:
        asking.setattr("llm2vec_ds.process.preemption.StopRequest.seen", lambda *_, **__: True)
        with pytest.raises(Stopped, match="after the last step of simcse, its encoder written: run the same"):
            train_stages([first, second])
        assert is_finished(tmp_path / "first")
        assert not (tmp_path / "second").exists()
        train(changed(values, output_dir=str(tmp_path / "alone"), max_steps=1))  # nothing follows
    train_stages([stage.model_copy(update={"resume": True}) for stage in (first, second)])
    assert is_finished(tmp_path / "second")


# Who works in it?


def test_one_run_a_folder(values: dict[str, Any], finished: Path) -> None:
    before = contents(finished)
    own = changed(values, output_dir=str(finished), overwrite=True)
    with held(finished / "lock", "first"), pytest.raises(UserError, match="run: another process is using it"):
        train(own)
    assert contents(finished) == before
    assert not (finished / "lock").exists()


def test_the_lock_goes_with_the_run_also_where_it_fails(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fails(*_: Any) -> None:
        seen.append((tmp_path / "run" / "lock").exists())
        raise ZeroDivisionError

    monkeypatch.setattr(engine_run.Trainer, "run", fails)
    with pytest.raises(ZeroDivisionError):
        train(changed(values, output_dir=str(tmp_path / "run")))
    assert seen == [True]
    assert not (tmp_path / "run" / "lock").exists()


# What does the end of a run need?


def test_adapters_are_merged_without_a_second_copy(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written are the trunk's own weights, and the same bits as from copies."""
    from llm2vec_ds.encoder.encoder import Encoder
    from llm2vec_ds.model.adapters import merged_state_dict

    copies: dict[str, torch.Tensor] = {}
    shared: set[bool] = set()
    whole = Encoder.save

    def save(self: Encoder, folder: Path, state: dict[str, torch.Tensor], adapters: Any) -> None:
        own = {value.data_ptr() for value in self.trunk.parameters()}
        shared.update(value.data_ptr() in own for value in state.values())
        whole(self, folder, state, adapters)

    def noted(trunk: Any, gather: Any, *, in_place: bool) -> dict[str, torch.Tensor]:
        copies.update(merged_state_dict(trunk, gather))
        return merged_state_dict(trunk, gather, in_place=in_place)

    monkeypatch.setattr(Encoder, "save", save)
    monkeypatch.setattr("llm2vec_ds.engine.trainer.merged_state_dict", noted)
    adapter = {"rank": 4, "alpha": 8, "zero_init": False}
    train(changed(values, output_dir=str(tmp_path / "run"), max_steps=1, adapter=adapter))
    assert shared == {True}
    written = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert written.keys() == copies.keys()
    assert all(torch.equal(value, copies[name]) for name, value in written.items())
