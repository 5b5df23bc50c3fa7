"""Servers as operators start and change them: `serve deploy` on a cluster, and the job on a machine of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from tests.support.bundles import save_tiny_bundle
from tests.support.cluster import wait_for

from unclip.pipelines.bundle import Bundle, save_stage

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BODY = {"prompt": "a red heart", "seed": 3}
CONFIG = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
- name: unclip
  import_path: unclip.cluster.serve:build
  args: {{recipe: all-in-one, bundle: {first}, ingress.num_cpus: 0.1}}
  deployments:
  - name: Ingress
    user_config: {{bundle: {bundle}}}
"""


@dataclass(frozen=True)
class Cluster:
    """A head node with its dashboard.

    Args:
        environment: that clients need.
        port: for HTTP.
    """

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    port: int

    def deploy(self, folder: Path, *, first: str, bundle: str) -> None:
        """`serve deploy`."""
        path = folder / "serve.yaml"
        path.write_text(CONFIG.format(port=self.port, first=first, bundle=bundle))
        command = [str(BIN / "serve"), "deploy", str(path)]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self) -> Mapping[str, str]:
        """Of the application, with `status` and `message`, as `serve status` shows it."""
        url = f"{self.environment['RAY_DASHBOARD_ADDRESS']}/api/serve/applications/"
        applications = httpx.get(url, headers=_headers(self.environment), timeout=30).json()["applications"]
        return applications.get("unclip", {"status": "", "message": ""})

    def replicas(self) -> set[int]:
        """Processes that serve."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return {process.pid for process in processes if "ServeReplica" in _command(process)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port, dashboard = _free_port(), _free_port()
    environment = _clean_environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--object-store-memory=300000000"]
    command += ["--node-ip-address=127.0.0.1", f"--ray-client-server-port={_free_port()}"]
    command += [f"--dashboard-agent-listen-port={_free_port()}"]
    with (tmp_path_factory.mktemp("head") / "log.txt").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: _answers(f"http://127.0.0.1:{dashboard}/api/version", _headers(environment)), 120)
        yield Cluster(head, environment, _free_port())
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two of the same shapes, with different decoders."""
    first, second = (str(tmp_path_factory.mktemp("bundles") / name) for name in ("first", "second"))
    save_tiny_bundle(first)
    shutil.copytree(first, second)
    bundle = Bundle.load(first)
    tensors = {name: tensor + 0.05 for name, tensor in bundle.load_model("decoder").state_dict().items()}
    clip = bundle.manifests["decoder"].clip
    save_stage(second, bundle.configs["decoder"], tensors=tensors, clip=clip, provenance={})
    return first, second


def test_a_bundle_that_is_none_is_refused_before_anything_starts(cluster: Cluster, tmp_path: Path) -> None:
    cluster.deploy(tmp_path, first=str(tmp_path), bundle=str(tmp_path))
    wait_for(lambda: cluster.status()["status"] == "DEPLOY_FAILED", 60)
    [line] = cluster.status()["message"].splitlines()[1:]  # the first one is Serve's
    assert line.startswith(f"unclip: '{tmp_path}' is no bundle")
    assert not cluster.replicas()


def test_a_configuration_that_changes_under_requests_loses_none(
    cluster: Cluster, bundles: tuple[str, str], tmp_path: Path
) -> None:
    first, second = bundles
    digests = [Bundle.load(uri).digest for uri in bundles]
    url = f"http://127.0.0.1:{cluster.port}"
    cluster.deploy(tmp_path, first=first, bundle=first)
    wait_for(lambda: _answers(f"{url}/health"), 120)
    before = cluster.replicas()

    with _steady_requests(url) as answers:
        cluster.deploy(tmp_path, first=first, bundle=second)  # its one line: new weights in the same process
        wait_for(lambda: bool(answers) and answers[-1].json()["revision"] == digests[1], 60)
        assert cluster.replicas() == before
        cluster.deploy(tmp_path, first=second, bundle=second)  # its arguments: another process
        wait_for(lambda: bool(after := cluster.replicas()) and not after & before, 60)
    assert {answer.status_code for answer in answers} == {200}
    assert [answers[0].json()["revision"], answers[-1].json()["revision"]] == digests


def test_the_job_serves_until_ctrl_c_and_ends_what_is_under_way(bundles: tuple[str, str]) -> None:
    port = _free_port()
    settings = [f"bundle={bundles[0]}", f"http.port={port}", "ingress.num_cpus=0.1"]
    command = [sys.executable, "jobs/serve.py", *(part for setting in settings for part in ("--set", setting))]
    job = subprocess.Popen(
        command, cwd=REPOSITORY, env=_clean_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == f"http://127.0.0.1:{port} serves {bundles[0]}; Ctrl-C stops it\n"
        url = f"http://127.0.0.1:{port}"
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(_post, url, n=4, num_inference_steps=300)
            time.sleep(1)  # of several seconds
            assert not request.done()
            os.killpg(job.pid, signal.SIGINT)
            assert request.result().status_code == 200
        assert job.wait(60) == 0
        assert "stopping" in job.stdout.read()
        assert not _answers(f"{url}/health")
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def _headers(environment: Mapping[str, str]) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}


@contextmanager
def _steady_requests(url: str) -> Iterator[list[httpx.Response]]:
    """One after the other for the whole block, with their answers."""
    stop, answers = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            answers.append(_post(url))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield answers
        finally:
            stop.set()
        asking.result()


def _post(url: str, **fields: int) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={**BODY, **fields}, timeout=120)


def _answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, headers=headers, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _clean_environment() -> dict[str, str]:
    """As a user's shell has it: nothing of another Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH", "AWS_"))}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
