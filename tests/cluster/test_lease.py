"""One driver a run, found out with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unclip.cluster import lease
from unclip.cluster.failures import RunFailed
from unclip.cluster.lease import Lease
from unclip.config.base import ConfigError
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

HOLD = """
import sys, time
from unclip.cluster.lease import Lease
from unclip.training.run_folder import RunFolder
with Lease(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def test_a_living_driver_keeps_others_out_and_a_killed_one_does_not(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run.uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being trained by process {holder.pid} on"), Lease(run):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Lease(run) as held:
        held.check()
    assert storage.names(run.uri) == []


def test_a_driver_on_another_machine_is_gone_when_its_file_does_not_change(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    uri = storage.join(run.uri, "driver.json")
    elsewhere = {"driver": "b", "host": "another", "pid": 1, "started": 0.0, "beat": 7}
    storage.write_json(uri, elsewhere)
    began = time.monotonic()
    with Lease(run):
        assert time.monotonic() - began >= lease.SILENT_BEATS * 0.2
    storage.write_json(uri, elsewhere)
    beat = threading.Timer(0.1, storage.write_json, (uri, elsewhere | {"beat": 8}))
    beat.start()
    with pytest.raises(ConfigError, match="is being trained by process 1 on another"), Lease(run):
        pass


def test_the_driver_that_lost_a_race_ends(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    uri = storage.join(run.uri, "driver.json")
    winner = {"driver": "b", "host": "another", "pid": 1, "started": 0.0, "beat": 1}
    with Lease(run) as held:
        held.check()
        storage.write_json(uri, winner)
        time.sleep(1.0)
        with pytest.raises(RunFailed, match="was taken over by process 1 on another"):
            held.check()
    assert storage.read_json(uri) == winner
