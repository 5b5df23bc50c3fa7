"""The images API of the platform's manifest, handed to a local Ray as KubeRay's operator does."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.support.bundles import save_tiny_bundle
from tests.support.cluster import wait_for
from tests.support.manifests import K8S, REPOSITORY, load
from tests.support.ray_nodes import free_port, ray, ray_nodes
from tests.support.serving import decoded

PYTHON = Path(sys.executable)
BODY = {"prompt": "a red heart", "seed": 3}
KEYS_IN_POD = "/etc/unclip/keys.json"


@dataclass(frozen=True)
class Service:
    """A server, what Serve says of its application, the storage that the pods' environment names, and what clients need."""

    url: str
    application: dict[str, Any]
    key: str
    storage: Path
    clients: Mapping[str, str]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Only the port and the place of the keys are not those of the manifest; the GPUs are made up."""
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    storage, keys = folder / "storage", folder / "keys.json"
    save_tiny_bundle(str(storage / "bundle"))
    key = _create_key(keys)
    text = _serve_config()
    assert KEYS_IN_POD in text
    config = yaml.safe_load(text.replace(KEYS_IN_POD, str(keys)))
    config["http_options"]["port"] = port
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNCLIP_STORAGE", str(storage))
        with ray_nodes(PYTHON, folder, head_cpus=0, worker_cpus=(8,), worker_gpus=2) as clients:
            headers = {"Authorization": f"Bearer {clients['RAY_AUTH_TOKEN']}"}
            api = f"{clients['RAY_ADDRESS']}/api/serve/applications/"
            httpx.put(api, json=config, headers=headers, timeout=60).raise_for_status()

            def application() -> dict[str, Any]:
                found: dict[str, Any] = httpx.get(api, headers=headers, timeout=30).json()["applications"]["unclip"]
                assert found["status"] != "DEPLOY_FAILED", found["message"]
                return found

            wait_for(lambda: application()["status"] == "RUNNING", 120)
            yield Service(f"http://127.0.0.1:{port}", application(), key, storage, clients)


def test_whoever_has_a_key_gets_a_picture(service: Service) -> None:
    answer = _ask(service, service.key, response_format="b64_json")
    [picture] = answer.json()["data"]
    assert decoded(base64.b64decode(picture["b64_json"])).shape == (32, 32, 3)


def test_whoever_has_none_is_refused(service: Service) -> None:
    for key in (None, "uk-of-somebody-else"):
        assert _ask(service, key).status_code == 401


def test_pictures_by_address_lie_in_the_platforms_storage(service: Service) -> None:
    [picture] = _ask(service, service.key, response_format="url").json()["data"]
    stored = [path.read_bytes() for path in (service.storage / "served/pictures").rglob("*.png")]
    assert httpx.get(picture["url"], timeout=30).content in stored


def test_it_runs_in_as_many_processes_as_the_manifest_asks_for(service: Service) -> None:
    [(name, deployment)] = service.application["deployments"].items()
    assert (name, deployment["status"], len(deployment["replicas"])) == ("Ingress", "HEALTHY", 2)


def test_probes_find_it_ready_without_a_key(service: Service) -> None:
    assert httpx.get(f"{service.url}/-/healthz", timeout=30).status_code == 200


def test_the_checkup_names_the_node_whose_gpus_are_made_up(service: Service) -> None:
    report = service.storage / "report.json"
    settings = [f"storage={service.storage}", f"report={report}", "checks=[nodes, gpus]"]
    checkup = ["python", f"{REPOSITORY}/jobs/preflight.py", *(part for text in settings for part in ("--set", text))]
    command = ray(PYTHON, "job", "submit", "--", *checkup)
    done = subprocess.run(command, env=dict(service.clients), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "1 of 2 checks failed: gpus" in done.stdout
    found = json.loads(report.read_text())
    failures = [(result["check"], result["node"]) for result in found["results"] if result["status"] == "failed"]
    assert failures == [("gpus", next(node["name"] for node in found["nodes"] if node["gpus"]))]
    assert len(found["nodes"]) == 2


def _serve_config() -> str:
    objects = load((K8S / "platform.yaml").read_text())
    [config] = [found["spec"]["serveConfigV2"] for found in objects if found["kind"] == "RayService"]
    return str(config)


def _create_key(file: Path) -> str:
    command = [str(PYTHON), "jobs/api_key.py", "create", "--file", str(file), "--id", "tests"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()


def _ask(service: Service, key: str | None, **fields: str) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{service.url}/v1/images/generations", json={**BODY, **fields}, headers=headers, timeout=120)
