"""What the watchdog says and leaves; tests/distributed/test_loop.py has two workers that wait for each other."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from unclip.training.run_folder import RunFolder
from unclip.training.watchdog import STALLED, Stall, describe_stalls, read_stalls

BATCH = Stall(1, 4, 11, "the batch of step 12", 30.2, "", "2026-01-01T00:00:30.200+00:00")
GRADIENTS = replace(
    BATCH, rank=0, waiting_for="the gradients of step 12", waited_s=30.6, time="2026-01-01T00:00:31.000+00:00"
)


def test_who_waited_for_what_in_the_order_they_began() -> None:
    assert describe_stalls([]) == ""
    both = [replace(stall, world_size=2) for stall in (GRADIENTS, BATCH)]
    expected = "rank 1 waited 30 s for the batch of step 12; rank 0 waited 31 s for the gradients of step 12"
    assert describe_stalls(both) == expected
    assert describe_stalls([GRADIENTS, BATCH]) == f"{expected}; no word of ranks 2, 3"
    assert describe_stalls([replace(BATCH, world_size=2)]).endswith("the batch of step 12; no word of rank 0")


WAITS = """
import sys, time
from unclip.training.run_folder import RunFolder
from unclip.training.watchdog import Watchdog

def sleeps():
    time.sleep(60)

watchdog = Watchdog(RunFolder(sys.argv[1]), rank=3, world_size=8, limit_s=0.5)
for _ in range(8):  # each within the limit, all together beyond it
    with watchdog.waiting("a short while"):
        time.sleep(0.1)
time.sleep(0.7)  # nothing is waited for
watchdog.step = 41
with watchdog.waiting("something"):
    try:
        with watchdog.waiting("the one that never comes"):
            if sys.argv[2] == "sleeps":
                sleeps()
            time.sleep(0.8)
            raise RuntimeError("the other workers are gone")  # while the watchdog already says why
    finally:
        print("left the block")
"""


def test_a_wait_beyond_the_limit_ends_the_process_with_a_word(tmp_path: Path) -> None:
    for way in ("sleeps", "raises"):
        run = RunFolder(str(tmp_path / way))
        command = [sys.executable, "-c", WAITS, run.uri, way]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == STALLED == 75
        assert ended.stdout == ""
        assert re.search(r"rank 3 waited \d s for the one that never comes: it ends here", ended.stderr)
        (stall,) = read_stalls(run)
        assert (stall.rank, stall.world_size, stall.step) == (3, 8, 41)
        assert (stall.waiting_for, 0.5 <= stall.waited_s < 5) == ("the one that never comes", True)
        if way == "sleeps":
            assert "in sleeps" in stall.stack


def test_without_stalls_there_are_none(tmp_path: Path) -> None:
    assert read_stalls(RunFolder(str(tmp_path))) == []
