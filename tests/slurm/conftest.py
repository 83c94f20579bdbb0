"""One SLURM for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import NO_DROPOUT, recipe
from tests.support.slurm_cluster import Cluster, missing_daemons, running_cluster
from tests.support.tiny import save_tiny_llama, sentences

REQUIRED = "LLM2VEC_DS_REQUIRE_SLURM"
"""Set where a skip would hide that nothing was tested, as in continuous integration."""


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """All tests of this folder run in one process, which has the one cluster."""
    item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_daemons():
        reason = f"NOT TESTED: no {', '.join(missing)} here; tests/slurm/install.sh installs SLURM as root"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: the test cluster's daemons run as root")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A recipe of some ten seconds, without dropout: losses do not depend on the number of ranks."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model")
    (folder / "texts.txt").write_text("\n".join(sentences(64)) + "\n", encoding="utf-8")
    return recipe(
        "mntp",
        folder / "model",
        folder / "texts.txt",
        Path("overridden"),
        max_steps=300,
        checkpoint={"every_steps": 25},
        **NO_DROPOUT,
    )
