"""Freed memory that stays: counted by the pages that the system has to bring."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES_OF_A_TENSOR = (64 << 20) // 4096
TIMES = 10
PROGRAM = f"""
import resource, sys, torch
from unclip.utils.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def use():
    torch.empty({64 << 20}, dtype=torch.uint8).fill_(1)
for _ in range({TIMES}):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_was_freed_is_used_again() -> None:
    is_set, faults = run("keep")
    if is_set == "False":
        pytest.skip("another C library than glibc")
    assert int(faults) < PAGES_OF_A_TENSOR
