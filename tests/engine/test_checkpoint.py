"""Checkpoint folders: whole or absent, checked by every byte, the last valid one never deleted."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2vec_ds.engine.checkpoint import CheckpointStore, Hashes, Manifest
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.durable import write_file

CONTENT = b"trainable state"


def write_parts(folder: Path) -> Hashes:
    write_file(folder / "part-00000.safetensors", CONTENT)
    return {"part-00000.safetensors": (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())}


def save(store: CheckpointStore, step: int, score: float | None = None) -> Path:
    return store.save(Manifest(step, {"recipe": {}}, {}, score), write_parts)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PART = "part-00000.safetensors"
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("flipped byte", lambda folder: flip_a_byte(folder / PART), "SHA-256 differs"),
    ("truncated", lambda folder: os.truncate(folder / PART, 3), "has 3 bytes instead of 15"),
    ("missing rank file", lambda folder: (folder / PART).unlink(), f"{PART} is missing"),
    ("flipped byte in the manifest", lambda folder: flip_a_byte(folder / "manifest.json"), "cannot be read"),
    ("empty manifest", lambda folder: os.truncate(folder / "manifest.json", 0), "cannot be read"),
    ("no manifest", lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
]


@pytest.mark.parametrize(("damage", "said"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], object], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 1)
    newest = save(store, 2)
    damage(newest)
    found = CheckpointStore(tmp_path, keep_last=3).newest_valid()
    assert found is not None
    assert found.step == 1
    assert str(newest) in caplog.text
    assert said in caplog.text
    damage(tmp_path / "step-00000001")
    with pytest.raises(UserError, match="no checkpoint in .* is valid"):
        CheckpointStore(tmp_path, keep_last=3).newest_valid()


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    manifest = save(store, 12, score=0.5) / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        manifest.write_bytes(damaged)
        try:
            found = store.check(manifest.parent)
        except ValueError:
            continue
        # Blanks between values carry nothing.
        assert found.manifest == Manifest.parse(whole)


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none", keep_last=1)
    assert store.newest_valid() is None
    assert store.best() is None


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_are_kept_and_the_best(keep_last: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=keep_last, lowest_is_best=False)
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.1, None], start=1):
        save(store, step, score)
    last = [f"step-{step:08d}" for step in range(7 - keep_last, 7)]
    assert names(store) == ["step-00000002", *last]
    best = store.best()
    assert best is not None
    assert best.step == 2
    assert store.best_score() == 0.9


def test_a_process_that_goes_on_keeps_the_best_of_the_one_before(tmp_path: Path) -> None:
    """It has read only the newest checkpoint. If the best is damaged, the next best is kept."""
    before = CheckpointStore(tmp_path, keep_last=1)
    for step, score in enumerate([0.9, 0.5, 0.8], start=1):
        save(before, step, score)
    assert names(before) == ["step-00000002", "step-00000003"]
    after = CheckpointStore(tmp_path, keep_last=1)
    assert after.newest_valid() is not None
    for step in (4, 5):
        save(after, step, 0.7)
        assert names(after) == ["step-00000002", f"step-{step:08d}"]
    flip_a_byte(tmp_path / "step-00000002" / PART)
    last = CheckpointStore(tmp_path, keep_last=1)
    assert last.newest_valid() is not None
    save(last, 6, 0.8)
    assert names(last) == ["step-00000005", "step-00000006"]


def test_scores_of_another_metric_do_not_count(tmp_path: Path) -> None:
    by_loss = CheckpointStore(tmp_path, keep_last=9, best_by="loss")
    by_loss.save(Manifest(1, {}, {}, 6.5, "loss"), write_parts)
    by_sts = CheckpointStore(tmp_path, keep_last=9, best_by="sts", lowest_is_best=False)
    assert by_sts.best() is None
    assert by_sts.best_score() is None
    by_sts.save(Manifest(2, {}, {}, 0.8, "sts"), write_parts)
    best = by_sts.best()
    assert best is not None
    assert best.step == 2


def test_the_earliest_of_equals_is_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, lowest_is_best=False)
    for step, score in enumerate([0.1, 0.9, 0.9, 0.3, 0.9], start=1):
        save(store, step, score)
    assert names(store) == ["step-00000002", "step-00000005"]
    best = store.best()
    assert best is not None
    assert best.step == 2


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """A new process saves once: the valid one must not be deleted for a damaged newer one."""
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    save(store, 2)
    flip_a_byte(tmp_path / "step-00000002" / PART)
    again = CheckpointStore(tmp_path, keep_last=2)
    found = again.newest_valid()
    assert found is not None
    assert found.step == 1
    save(again, 2)  # the same step again, over the damaged one
    assert names(again) == ["step-00000001", "step-00000002"]
    assert [again.check(tmp_path / name).step for name in names(again)] == [1, 2]


@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "mkdir"])
def test_a_full_disk_costs_no_checkpoint(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(UserError) as refused:
        save(store, 2)
    monkeypatch.undo()
    line = str(refused.value)
    assert "the checkpoint of step 2 cannot be written" in line
    assert "No space left on device: free some space" in line
    assert "The checkpoint of step 1 is untouched: go on from it with resume=true" in line
    assert names(store) == ["step-00000001"]
    assert store.newest_valid() is not None
    save(store, 2)
    assert names(store) == ["step-00000002"]


def test_what_killed_saves_left_is_cleared(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    for left in (".unfinished-step-00000002", ".removed-step-00000000"):
        (tmp_path / left).mkdir()
        (tmp_path / left / PART).write_bytes(b"part of")
    store.clear_unfinished()
    assert names(store) == ["step-00000001"]


def test_an_old_checkpoint_that_stays_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("llm2vec_ds.engine.checkpoint.remove_folder", busy)
    save(store, 2)
    assert "cannot be deleted: Device or resource busy" in caplog.text
    found = store.newest_valid()
    assert found is not None
    assert found.step == 2
