"""Freed memory stays with a training process, and goes back after it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from llm2vec_ds.process.host_heap import _SETTINGS

CHILD = """
import psutil, torch
from llm2vec_ds.process.host_heap import freed_memory_is_kept

def held_after_freeing_mib():
    blocks = [torch.ones(25 * 2**18) for _ in range(8)]  # 25 MiB each
    big = torch.ones(100 * 2**18)  # larger than glibc's largest threshold
    del blocks, big
    return (psutil.Process().memory_info().rss - before) / 2**20

before = psutil.Process().memory_info().rss
with freed_memory_is_kept():
    with freed_memory_is_kept():
        pass
    inside = held_after_freeing_mib()
after = (psutil.Process().memory_info().rss - before) / 2**20
print(round(inside), round(after), round(held_after_freeing_mib()))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def held_mib(**settings: str) -> list[int]:
    """Inside, right after, and after the same work outside."""
    environment = {k: v for k, v in os.environ.items() if k not in _SETTINGS} | settings
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in child.stdout.split()]


def test_freed_blocks_are_kept_inside_and_given_back_after() -> None:
    inside, after, outside = held_mib()
    assert inside >= 290
    assert after <= 30
    assert outside <= inside - 90  # the large block at least has gone back


def test_settings_of_the_environment_are_left_alone() -> None:
    inside, _, _ = held_mib(MALLOC_MMAP_THRESHOLD_="1048576")
    assert inside <= 30
