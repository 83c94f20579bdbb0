"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub should fail at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llm2vec_kernels import devices

from tests.support.runs import choose_library
from tests.support.tiny import save_tiny_llama, sentences

choose_library()
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer on disk."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 distinct texts, one a line."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(sentences(64)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _cache_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What fixtures of a module do, and processes that outlive a test, keeps off the user's cache too."""
    os.environ["LLM2VEC_DS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_gate() -> Iterator[None]:
    """What a test makes of the environment or a device is no other's."""
    devices._refusal.cache_clear()
    yield
    devices._refusal.cache_clear()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(tmp_path_factory.mktemp("cache") / "own"))
