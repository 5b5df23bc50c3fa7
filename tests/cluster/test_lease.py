"""One driver a folder, found out with real processes."""

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
from unclip.utils import storage

HOLD = """
import sys, time
from unclip.cluster.lease import Lease
with Lease(sys.argv[1], "out = 'somewhere'"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "out" / "driver.json")


def lease_of(uri: str) -> Lease:
    return Lease(uri, "out = 'somewhere'")


def test_a_living_driver_keeps_others_out_and_a_killed_one_does_not(uri: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ConfigError, match=f"out = 'somewhere' is being worked at by process {holder.pid} on"),
        lease_of(uri),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lease_of(uri) as held:
        held.check()
    assert not storage.exists(uri)


def test_a_driver_on_another_machine_is_gone_when_its_file_does_not_change(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    elsewhere = {"driver": "b", "host": "another", "pid": 1, "started": 0.0, "beat": 7}
    storage.write_json(uri, elsewhere)
    began = time.monotonic()
    with lease_of(uri):
        assert time.monotonic() - began >= lease.SILENT_BEATS * 0.2
    storage.write_json(uri, elsewhere)
    beat = threading.Timer(0.1, storage.write_json, (uri, elsewhere | {"beat": 8}))
    beat.start()
    with pytest.raises(ConfigError, match="is being worked at by process 1 on another"), lease_of(uri):
        pass


def test_the_driver_that_lost_a_race_ends(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    winner = {"driver": "b", "host": "another", "pid": 1, "started": 0.0, "beat": 1}
    with lease_of(uri) as held:
        held.check()
        storage.write_json(uri, winner)
        time.sleep(1.0)
        with pytest.raises(RunFailed, match="was taken over by process 1 on another"):
            held.check()
    assert storage.read_json(uri) == winner
