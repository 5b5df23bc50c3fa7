"""Nodes that are killed, that say goodbye, that come back."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
from ray.cluster_utils import Cluster
from tests.chaos.conftest import STEPS, Configure, add_node, nodes_with_workers
from tests.support.cluster import assert_same_end, once, step_of

from unclip.cluster.fit import fit
from unclip.training.run_folder import RunFolder


def test_a_killed_node(cluster: Cluster, configure: Configure, straight: RunFolder) -> None:
    """kill -9 of everything that runs on it; another one takes its place."""
    config = configure("killed-node")
    run = RunFolder(config.run)

    def kill() -> None:
        cluster.remove_node(nodes_with_workers(cluster)[0], allow_graceful=False)
        add_node(cluster)

    with once(lambda: step_of(run) >= 20, kill):
        fit(config)
    kinds = [line["kind"] for line in run.lines(run.restarts_uri)]
    assert kinds == ["failure"]
    assert_same_end(run, straight)


def test_a_node_that_says_goodbye_costs_no_step(cluster: Cluster, configure: Configure, straight: RunFolder) -> None:
    config = configure("drained", loop={"max_steps": STEPS, "log_every": 1, "checkpoint_every_s": 600.0})
    run = RunFolder(config.run)

    def drain() -> None:
        node = nodes_with_workers(cluster)[0]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "test", "--deadline-remaining-seconds", "20"]
        subprocess.run(command, check=True, capture_output=True)
        threading.Timer(20, cluster.remove_node, (node,), {"allow_graceful": False}).start()
        add_node(cluster)

    with once(lambda: step_of(run) >= 20, drain):
        fit(config)
    (line,) = run.lines(run.restarts_uri)
    assert line["kind"] == "preemption"
    assert line["step"] >= 20
    trained = [record["step"] for record in run.lines(run.metrics_uri)]
    assert len(trained) - len(set(trained)) <= 1
    assert_same_end(run, straight)


def test_the_run_shrinks_and_grows_with_its_cluster(
    cluster: Cluster, configure: Configure, straight: RunFolder
) -> None:
    """Each sample is trained once, whoever does it, and the curve stays the same but for rounding."""
    settings = {"num_workers": 2, "min_workers": 1, "wait_s": 120.0}
    config = configure(
        "elastic", resources=settings, loop={"max_steps": STEPS, "log_every": 1, "checkpoint_every_s": 2.0}
    )
    run = RunFolder(config.run)

    def lose_one() -> None:
        cluster.remove_node(nodes_with_workers(cluster)[0], allow_graceful=False)

    def shrunk() -> bool:
        return any(record["world_size"] == 1 for record in run.lines(run.metrics_uri))

    with once(lambda: step_of(run) >= 20, lose_one), once(shrunk, lambda: add_node(cluster)):
        summary = fit(config)
    lines = run.lines(run.restarts_uri)
    assert [(line["kind"], line["world_size"]) for line in lines] == [("failure", 1), ("resize", 2)]
    assert summary["world_size"] == 2
    records = run.metrics()
    batch = config.loop.global_batch_size
    assert [(record["step"], record["samples_seen"]) for record in records] == [
        (step, step * batch) for step in range(1, STEPS + 1)
    ]
    grown = lines[1]["step"]
    trained = [record["step"] for record in run.lines(run.metrics_uri) if record["world_size"] == 1]
    assert max(trained) <= grown + 1  # the resize costs no step
    losses = [[record["loss"] for record in folder.metrics()] for folder in (run, straight)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
