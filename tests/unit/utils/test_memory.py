"""Freed memory that stays: counted by the pages that the system has to bring."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from unclip.utils.memory import free_memory, memory_of

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


CPU = torch.device("cpu")
MEGABYTE = 2**20


def test_the_fullest_moment_and_what_is_left_are_counted() -> None:
    before, kept = torch.ones(MEGABYTE, dtype=torch.uint8), []

    def compute() -> None:
        one = before + 1
        two = torch.cat([one, one])  # three megabytes with the one
        view = two[:10]
        one.add_(1)
        del one
        kept.append(view.view(5, 2))  # holds the two
        torch.ones(MEGABYTE // 2, dtype=torch.uint8)

    assert memory_of(compute, CPU) == (3 * MEGABYTE, 2 * MEGABYTE)
    assert memory_of(kept.clear, CPU) == (0, 0)


def test_what_gradients_need_counts_while_it_is_needed() -> None:
    def compute() -> None:
        weights = torch.ones(MEGABYTE // 4, requires_grad=True)
        (gradient,) = torch.autograd.grad((weights.exp() ** 2).sum(), weights)
        del gradient

    peak, left = memory_of(compute, CPU)
    assert peak >= 4 * MEGABYTE  # weights, both results, gradients of them
    assert left == 0


def test_free_memory_is_some_of_the_machines() -> None:
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total
