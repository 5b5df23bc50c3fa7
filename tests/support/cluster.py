"""What tests that disturb runs have in common: whose processes to kill, when, and what two runs come to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import torch

from unclip.training import checkpoint, zero_state
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


def step_of(run: RunFolder) -> int:
    """The newest step that the run has logged."""
    try:
        return int(storage.read_json(run.progress_uri)["step"])
    except (OSError, json.JSONDecodeError):
        return 0


def wait_for(condition: Callable[[], bool], limit_s: float = 300) -> None:
    """Returns when `condition` holds; fails where it does not in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def once(condition: Callable[[], bool], action: Callable[[], None], limit_s: float = 300) -> Iterator[None]:
    """While the block runs, does `action` as soon as `condition` holds; fails at the end where it never did."""
    stop = threading.Event()

    def watch() -> bool:
        deadline = time.monotonic() + limit_s
        while not stop.is_set() and time.monotonic() < deadline:
            if condition():
                action()
                return True
            time.sleep(0.05)
        return False

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(watch)
        try:
            yield
        finally:
            stop.set()
        assert done.result(), "the block was over before the condition held"


def training_workers() -> list[psutil.Process]:
    """Of this process's own Ray instance, or of the clusters it has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_a_worker(number: int = 0) -> None:
    """kill -9."""
    workers = sorted(training_workers(), key=lambda process: process.pid)
    workers[number % len(workers)].kill()


def final_state(run: RunFolder) -> dict[str, torch.Tensor]:
    """Weights, moments and moving averages of the newest checkpoint, each parameter flat, by `kind/name`."""
    newest = checkpoint.latest(run.checkpoints_uri)
    assert newest is not None
    with checkpoint.FragmentReader(newest) as reader:
        return {
            f"{kind}/{name}": reader.read(name, kind, 0, math.prod(shape))
            for name, shape in newest.shapes.items()
            for kind in zero_state.KINDS
        }


def assert_same_end(run: RunFolder, other: RunFolder) -> None:
    """Both have come to the same step, with the same bits in weights, moments and averages."""
    state, expected = final_state(run), final_state(other)
    assert step_of(run) == step_of(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
