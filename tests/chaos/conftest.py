"""Clusters of several nodes on this machine, drivers to kill, and the run that nothing disturbs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder

STEPS = 150
"""Enough to last through what is done to a run."""
DRIVER = Path(__file__).with_name("driver.py")
_NODE = {"object_store_memory": 150 * 2**20}

Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def configure(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """A run of two workers by its name; further settings by section."""
    folder = tmp_path_factory.mktemp("runs")

    def build(name: str, **changes: Any) -> TrainConfig:
        base: dict[str, Any] = {
            "run": f"{folder}/{name}",
            "bundle": None,
            "clip": None,
            "data": {"path": f"{openmoji}/256/train"},
            "loop": {"max_steps": STEPS, "log_every": 1, "checkpoint_every_s": 2.0},
            # At the recipe's rate a difference in the last bit grows a thousandfold in 60 steps, of one worker and of two.
            "optimizer": {"eps": 1e-5, "learning_rate": 1e-4},
            "resources": {"num_workers": 2, "wait_s": 120.0},
            "reporting": {"tensorboard": False},
        }
        return RECIPES["upsampler_256"]["debug"]().merged(base).merged(changes)

    return build


@dataclass
class Driver:
    """A driver in a process of its own, with its own local Ray or in the cluster at `RAY_ADDRESS`."""

    config: TrainConfig
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config.to_dict()))
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, str(DRIVER), str(path)]
        output = subprocess.PIPE
        environment, errors = kept | self.environment, subprocess.STDOUT
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=errors, text=True, start_new_session=True
        )

    def run(self) -> str:
        """To its end; what it said."""
        process = self.start()
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said[-4000:]
        return said


@pytest.fixture(scope="session")
def straight(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nothing disturbs."""
    config = configure("straight")
    Driver(config, tmp_path_factory.mktemp("straight")).run()
    return RunFolder(config.run)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with one CPU and two nodes with one each, to which this process is connected."""
    from unclip.cluster import session

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    session._prepare_environment()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **_NODE}, shutdown_at_exit=False)
    try:
        for _ in range(2):
            add_node(made)
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, **_NODE)


def nodes_with_workers(cluster: Cluster) -> list[Any]:
    """Nodes beside the head that hold training workers."""
    found = []
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        with suppress(psutil.NoSuchProcess):
            names = [child.name() + " ".join(child.cmdline()) for child in raylet.children(recursive=True)]
            if any("RayTrainWorker" in name for name in names):
                found.append(node)
    return found


def wait_until_gone(processes: list[psutil.Process], limit_s: float) -> None:
    """Fails where one of them lives longer."""
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    assert not alive, [process.cmdline()[:1] for process in alive]
