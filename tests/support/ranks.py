"""Runs a function of a test file in several processes that form a gloo group."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

Function = Callable[[int, int, Path], Any]
LAUNCHER = Path(__file__).with_name("launch.py")


def run_ranks(function: Function, world_size: int, folder: Path) -> list[Any]:
    """The JSON answers of `function(rank, world_size, folder)`, by rank."""
    meeting = folder / f"ranks-{uuid.uuid4().hex[:8]}"
    meeting.mkdir(parents=True)
    ranks = [_start(function, rank, world_size, folder, meeting) for rank in range(world_size)]
    try:
        failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout=240)]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((meeting / f"output-{rank}.txt").read_text()[-4000:] for rank in range(world_size))
    assert not failed, f"ranks {failed} failed:\n{logs}"
    return [json.loads((meeting / f"answer-{rank}.json").read_text()) for rank in range(world_size)]


def _start(function: Function, rank: int, world_size: int, folder: Path, meeting: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)]),  # the package, and tests.support
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": str(rank),
    }
    test = [inspect.getfile(function), function.__name__]
    command = [sys.executable, *map(str, (LAUNCHER, *test, rank, world_size, folder, meeting))]
    with (meeting / f"output-{rank}.txt").open("w") as output:
        return subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT)
