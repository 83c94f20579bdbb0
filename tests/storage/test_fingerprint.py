"""Keys and hashes: equal for equal contents, other for other contents, and of a version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm2vec_ds.storage.fingerprint import file_sha256, files_in, files_sha256, json_sha256, key_of


def test_a_key_changes_with_each_part_and_with_the_version() -> None:
    keys = [
        key_of({"a": 1, "b": None}, [1.5], version=1),
        key_of({"a": 1, "b": None}, [1.5], version=2),
        key_of({"a": 2, "b": None}, [1.5], version=1),
        key_of({"a": 1, "b": None}, [1.5], None, version=1),
    ]
    assert len(set(keys)) == 4
    assert key_of({"b": None, "a": 1}, [1.5], version=1) == keys[0]
    assert key_of({"b": None, "a": 1}, [1.5], version=2) == keys[1]


def test_a_key_of_version_1_has_no_version_in_it() -> None:
    """It was written before versions were."""
    digest = hashlib.sha256(b'["x", {"a": 1}]').hexdigest()[:24]
    assert key_of("x", {"a": 1}, version=1) == digest
    assert key_of("x", {"a": 1}, version=3) == f"v3-{digest}"


def test_hashes_are_sha256(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"first")
    b.write_bytes(b"second")
    assert file_sha256(a) == hashlib.sha256(b"first").hexdigest()
    both = hashlib.sha256(b"first").digest() + hashlib.sha256(b"second").digest()
    assert files_sha256([a, b]) == hashlib.sha256(both).hexdigest() != files_sha256([b, a])
    assert json_sha256({"b": 1, "a": 2}) == hashlib.sha256(b'{"a": 2, "b": 1}').hexdigest()


def test_files_of_a_folder_change_with_size_and_time(tmp_path: Path) -> None:
    assert files_in(tmp_path / "none") == []
    (tmp_path / "a").write_bytes(b"1")
    before = files_in(tmp_path)
    (tmp_path / "a").write_bytes(b"12")
    assert files_in(tmp_path) != before
