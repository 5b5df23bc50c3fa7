"""Drivers, controllers and whole clusters that are killed: what is left ends, and the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from tests.chaos.conftest import STEPS, Configure, Driver, wait_until_gone
from tests.support.cluster import assert_same_end, once, step_of, wait_for

from unclip.cluster.fit import fit
from unclip.cluster.jobs import INTERRUPTED
from unclip.training.run_folder import RunFolder

CHANCE = random.Random(11)


def descendants(process: psutil.Process, name: str) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if name in " ".join(child.cmdline())]


@pytest.mark.parametrize("where", ["of its own", "joined"])
def test_a_killed_driver(
    where: str, request: pytest.FixtureRequest, configure: Configure, straight: RunFolder, tmp_path: Path
) -> None:
    """At a random step, with a Ray instance of its own and as one job of a cluster that lives on."""
    environment, host = {}, None
    if where == "joined":
        cluster: Cluster = request.getfixturevalue("cluster")
        environment, host = {"RAY_ADDRESS": cluster.address}, psutil.Process()
    config = configure(f"killed-driver-{where.split()[0]}")
    run = RunFolder(config.run)
    driver = Driver(config, tmp_path, environment)
    process = driver.start()
    step = CHANCE.randrange(10, STEPS // 2)
    wait_for(lambda: step_of(run) >= step)
    left = descendants(host or psutil.Process(process.pid), "RayTrainWorker")
    assert len(left) == 2
    process.kill()
    process.wait()
    wait_until_gone(left, 30)
    assert step_of(run) < STEPS
    driver.run()
    assert_same_end(run, straight)


def test_ctrl_c_ends_everything_and_the_same_command_goes_on(
    configure: Configure, straight: RunFolder, tmp_path: Path
) -> None:
    """A terminal sends it to the driver and all that it has started."""
    config = configure("ctrl-c")
    run = RunFolder(config.run)
    driver = Driver(config, tmp_path)
    process = driver.start()
    wait_for(lambda: step_of(run) >= 20)
    workers = descendants(psutil.Process(process.pid), "RayTrainWorker")
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == INTERRUPTED, said[-4000:]
    assert "the same command goes on from the newest checkpoint" in said
    wait_until_gone(workers, 30)
    assert step_of(run) < STEPS
    driver.run()
    assert_same_end(run, straight)


def test_a_killed_controller(cluster: Cluster, configure: Configure, straight: RunFolder) -> None:
    """kill -9 of the process that Ray Train watches the workers from: what it had reserved is given back."""
    config = configure("killed-controller")
    run = RunFolder(config.run)

    def kill() -> None:
        (controller,) = descendants(psutil.Process(), "ray::TrainController")
        controller.kill()

    with once(lambda: step_of(run) >= 20, kill):
        fit(config)
    assert [line["kind"] for line in run.lines(run.restarts_uri)] == ["failure"]
    assert_same_end(run, straight)


def test_a_lost_cluster_ends_the_driver_and_the_same_command_goes_on(
    configure: Configure, straight: RunFolder, tmp_path: Path
) -> None:
    config = configure("lost-cluster")
    run = RunFolder(config.run)
    driver = Driver(config, tmp_path)
    process = driver.start()
    wait_for(lambda: step_of(run) >= 20)
    workers = descendants(psutil.Process(process.pid), "RayTrainWorker")
    (head,) = descendants(psutil.Process(process.pid), "gcs_server")
    head.kill()
    try:
        process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode != 0
    wait_until_gone(workers, 30)
    assert step_of(run) < STEPS
    driver.run()
    assert_same_end(run, straight)
