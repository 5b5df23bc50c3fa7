"""Ray clusters as operators start them: `ray start` for each node, with token authentication, for jobs that are submitted."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.support.cluster import wait_for

OBJECT_STORE_BYTES = 300_000_000


def user_environment(python: Path) -> dict[str, str]:
    """As a user's shell has it: nothing of another Ray, no path to this repository, and `python` first on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH", "AWS_"))}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


def ray(python: Path, *arguments: str) -> list[str]:
    """A command of Ray's, by this interpreter."""
    return [str(python), "-m", "ray.scripts.scripts", *arguments]


@contextmanager
def ray_nodes(
    python: Path,
    folder: Path,
    *,
    head_cpus: int,
    worker_cpus: tuple[int, ...] = (),
    worker_gpus: int = 0,
    cwd: Path | None = None,
) -> Iterator[Mapping[str, str]]:
    """A head with its dashboard and its workers, on this machine; the environment that clients need.

    Args:
        python: the interpreter of all nodes.
        folder: for what the nodes say.
        head_cpus, worker_cpus, worker_gpus: what each node declares, whatever the machine has.
        cwd: where the nodes are started, and so where jobs without a working directory run.
    """
    port, dashboard = free_port(), free_port()
    environment = user_environment(python) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",
    }
    # A submitted job joins the cluster that its node's folder names: in the usual one, that is whichever started last.
    own = tempfile.mkdtemp(prefix="ray-")  # short: the names of sockets may have 107 letters
    head = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={own}"]
    nodes = [["--head", f"--num-cpus={head_cpus}", *head, f"--ray-client-server-port={free_port()}"]]
    worker = [f"--address=127.0.0.1:{port}", f"--num-gpus={worker_gpus}"]
    nodes += [[*worker, f"--num-cpus={cpus}"] for cpus in worker_cpus]
    started: list[subprocess.Popen[bytes]] = []
    url = f"http://127.0.0.1:{dashboard}"
    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    try:
        for number, arguments in enumerate(nodes):
            command = ray(python, "start", "--block", *arguments, "--node-ip-address=127.0.0.1")
            command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
            command += [f"--dashboard-agent-listen-port={free_port()}"]  # the fixed default may be taken
            with (folder / f"node-{number}.txt").open("w") as log:
                started.append(
                    subprocess.Popen(command, env=environment, cwd=cwd, stdout=log, stderr=log, start_new_session=True)
                )
            wait_for(lambda count=number + 1: _living_nodes(url, headers, started) >= count, 120)
        yield environment | {"RAY_ADDRESS": url}
    finally:
        _stop(started)
        shutil.rmtree(own, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _living_nodes(url: str, headers: Mapping[str, str], processes: list[subprocess.Popen[bytes]]) -> int:
    """As the dashboard counts them; 0 where it does not answer yet."""
    assert all(process.poll() is None for process in processes), "a node has ended"
    try:
        answer = httpx.get(f"{url}/api/v0/nodes", headers=headers, timeout=5)
    except httpx.TransportError:
        return 0
    if answer.status_code != 200:
        return 0
    return sum(node["state"] == "ALIVE" for node in answer.json()["data"]["result"]["result"])


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Workers before their head."""
    for process in reversed(processes):
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
