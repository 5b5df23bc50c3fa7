"""A Ray cluster whose nodes an autoscaler brings and takes away, all of them on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus
from tests.support.cluster import wait_for
from tests.support.ray_nodes import free_port

Group = Mapping[str, Any]

_NO_COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def group(most: int, labels: Mapping[str, str], **resources: float) -> Group:
    """Up to `most` nodes, none at first, with these Ray labels and resources (CPU=2, GPU=1) each."""
    return {
        "min_workers": 0,
        "max_workers": most,
        "resources": resources,
        "labels": dict(labels),
        "node_config": {},
    }


@contextmanager
def cluster_from_zero(folder: Path, groups: Mapping[str, Group], *, idle_s: float) -> Iterator[str]:
    """The address of a head without CPUs, under Ray's autoscaler v2; nodes go that were idle for `idle_s`.

    Ray's own provider of nodes that are processes, but not `ray.cluster_utils.AutoscalingCluster`, which ends all of the
    machine's Ray with `ray stop`. `folder` is kept short: sockets are below it.
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_autoscaling(address, groups, idle_s)))
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}"]
    command += ["--num-cpus=0", "--num-gpus=0", "--object-store-memory=200000000", "--include-dashboard=false"]
    command += [f"--temp-dir={folder}/ray", f"--autoscaling-config={config}"]
    with (folder / "log.txt").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: _autoscaler_reports(address, head), 60)
        yield address
    finally:
        processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=15)


def status(address: str) -> GetClusterStatusReply:
    """What GCS knows of the nodes, and of what the autoscaler does."""
    return GetClusterStatusReply.FromString(GcsClient(address=address).get_cluster_status(timeout_s=10))


def groups_of_nodes(address: str) -> list[str]:
    """The group of each living node but the head."""
    states = status(address).cluster_resource_state.node_states
    living = [node.ray_node_type_name for node in states if node.status != NodeStatus.DEAD]
    return sorted(name for name in living if name != FAKE_HEAD_NODE_TYPE)


def _autoscaler_reports(address: str, head: subprocess.Popen[bytes]) -> bool:
    assert head.poll() is None, "the head has ended"
    try:
        socket.create_connection(("127.0.0.1", int(address.split(":")[1])), timeout=1).close()
    except OSError:
        return False
    return status(address).autoscaling_state.autoscaler_state_version > 0


def _autoscaling(address: str, groups: Mapping[str, Group], idle_s: float) -> dict[str, Any]:
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "from-zero",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "max_workers": sum(group["max_workers"] for group in groups.values()),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1000,
        **{name: {} for name in ("auth", "file_mounts")},
        **{name: [] for name in _NO_COMMANDS},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **groups},
    }
