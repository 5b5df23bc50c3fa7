"""Disks that are full, stores that do not answer, uploads that are cut off."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from tests.chaos.conftest import STEPS, Configure
from tests.support import faults, s3
from tests.support.cluster import assert_same_end, kill_a_worker, once, step_of
from tests.support.s3 import ObjectStore

from unclip.cluster.fit import fit
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

OUTAGE_S = 60.0


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with s3.object_store() as made:
        yield made


@pytest.fixture
def s3_cluster(store: ObjectStore, cluster: Cluster) -> Cluster:
    """A cluster whose processes find the store in their environment."""
    return cluster


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(cluster: Cluster, configure: Configure, straight: RunFolder, small_disk: Path) -> None:
    """Full for 15 s: no checkpoints meanwhile, and the run goes on."""
    config = configure("full-disk", run=f"{small_disk}/run")
    run, filler = RunFolder(config.run), small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass
        threading.Timer(15.0, filler.unlink).start()

    with once(lambda: step_of(run) >= 20, fill):
        fit(config)
    assert_same_end(run, straight)


def upload(source: str, target: str) -> None:
    for name in storage.names(source):
        storage.write_bytes(f"{target}/{name}", storage.read_bytes(f"{source}/{name}"))


def test_a_store_that_is_away_for_a_minute(
    store: ObjectStore, s3_cluster: Cluster, configure: Configure, straight: RunFolder, openmoji: str
) -> None:
    """Records, checkpoints and metrics are on it; every request of a minute in the middle of the run fails."""
    upload(f"{openmoji}/256/train", f"{store.uri}/records")
    config = configure("away", run=f"{store.uri}/away", data={"path": f"{store.uri}/records"})
    run = RunFolder(config.run)
    plans: list[faults.Plan] = []

    def outage() -> None:
        with store.proxy.faults(kinds=(faults.INTERNAL_ERROR, faults.RESET_BEFORE), rate=1.0, most=10**9) as plan:
            plans.append(plan)
            time.sleep(OUTAGE_S)

    with once(lambda: step_of(run) >= 20, outage):
        fit(config)
    assert sum(plans[0].injected.values()) > 20
    assert_same_end(run, straight)


def test_a_worker_killed_in_the_middle_of_an_upload(
    store: ObjectStore, s3_cluster: Cluster, configure: Configure, straight: RunFolder
) -> None:
    config = configure("cut-off", run=f"{store.uri}/cut-off")
    run = RunFolder(config.run)

    def cut_off() -> None:
        settings = {"kinds": (faults.STALL,), "methods": ("PUT", "POST"), "containing": ".safetensors"}
        with store.proxy.faults(**settings) as plan:
            while not plan.injected[faults.STALL]:
                time.sleep(0.02)
            kill_a_worker()

    with once(lambda: step_of(run) >= 20, cut_off):
        fit(config)
    assert [line["kind"] for line in run.lines(run.restarts_uri)] == ["failure"]
    assert run.metrics()[-1]["step"] == STEPS
    assert_same_end(run, straight)
    for folder in storage.names(run.checkpoints_uri):  # what was cut off has been collected
        assert storage.exists(f"{run.checkpoints_uri}/{folder}/manifest.json")
