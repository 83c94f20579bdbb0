"""Servers' environments, installed where they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.serving_environment import CannotInstallError, environment

REQUIRED = "LLM2VEC_DS_REQUIRE_SERVING"
"""Set where a skip would hide that nothing was tested, as in continuous integration."""


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """All tests of this folder run in one process: two servers at once need twice the memory."""
    item.add_marker(pytest.mark.xdist_group("serving"))


def _installed(server: str) -> Path:
    try:
        return environment(server)
    except CannotInstallError as error:
        reason = f"NOT TESTED: {server} cannot be installed: {error}"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The `bin` of vLLM's environment."""
    return _installed("vllm")


@pytest.fixture(scope="session")
def infinity() -> Path:
    """The `bin` of infinity's environment."""
    return _installed("infinity")
