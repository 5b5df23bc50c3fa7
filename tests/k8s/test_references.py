"""Whatever a manifest names is there: accounts, roles, secrets and their keys, labels, ports, queues, flags of Ray."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.scripts.scripts import start
from ray.serve._private.constants import DEFAULT_HTTP_PORT
from tests.support.manifests import (
    K8S,
    NAMESPACE,
    Object,
    Pod,
    build,
    cluster_spec,
    leaves,
    load,
    name,
    pods,
    quantity,
    selects,
    surroundings,
)

PORTS = {
    "gcs-server": ray_constants.DEFAULT_PORT,
    "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
    "serve": DEFAULT_HTTP_PORT,
    "metrics": 8080,  # KubeRay's default for --metrics-export-port
    "as-metrics": AUTOSCALER_METRIC_PORT,
    "dash-metrics": DASHBOARD_METRIC_PORT,
}
"""Names of ports, by which KubeRay finds them, and what listens there."""
AGENT = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
MADE_BY_KUBERNETES = {"kube-root-ca.crt"}
"""ConfigMaps that every namespace has."""


@dataclass(frozen=True)
class Reference:
    """To an object beside the one that names it."""

    kind: str
    name: str
    keys: tuple[str, ...] = ()


def references(node: Any) -> Iterator[Reference]:
    """All of ConfigMaps, Secrets and claims, anywhere in an object."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _reference(key, value)
        yield from references(value)


def _reference(key: str, value: Mapping[str, Any]) -> Iterator[Reference]:
    kinds = {"configMapRef": "ConfigMap", "configMapKeyRef": "ConfigMap", "configMap": "ConfigMap"}
    kinds |= {"secretRef": "Secret", "secretKeyRef": "Secret", "secret": "Secret"}
    named = value.get("name") or value.get("secretName")
    if key in kinds and isinstance(named, str):
        keys = [value["key"]] if "key" in value else [item["key"] for item in value.get("items", [])]
        yield Reference(kinds[key], named, tuple(keys))
    if key == "persistentVolumeClaim":
        yield Reference("PersistentVolumeClaim", value["claimName"])


@functools.cache
def examples() -> tuple[Object, ...]:
    """What people make by hand, after an example."""
    return tuple(found for file in sorted((K8S / "examples").rglob("*.yaml")) for found in load(file.read_text()))


def known(leaf: str) -> dict[tuple[str, str], set[str]]:
    """The keys of every ConfigMap, Secret and claim beside a leaf."""
    return {
        (found["kind"], found["metadata"]["name"]): {*found.get("data", {}), *found.get("stringData", {})}
        for found in [*surroundings(leaf), *examples()]
        if found.get("kind") in ("ConfigMap", "Secret", "PersistentVolumeClaim")
    }


def test_secrets_config_maps_and_claims_are_there(leaf: str, objects: tuple[Object, ...]) -> None:
    there = known(leaf)
    wrong = set()
    for found in objects:
        for reference in references(found):
            if reference.name in MADE_BY_KUBERNETES:
                continue
            keys = there.get((reference.kind, reference.name))
            if keys is None or not set(reference.keys) <= keys:
                wrong.add(reference)
    assert wrong == set()


def test_service_accounts_are_there(leaf: str, objects: tuple[Object, ...]) -> None:
    there = {found["metadata"]["name"] for found in surroundings(leaf) if found["kind"] == "ServiceAccount"}
    named = {pod.spec.get("serviceAccountName") for found in objects for pod in pods(found)}
    assert named <= there


def test_roles_and_bindings_name_what_is_there(objects: tuple[Object, ...]) -> None:
    there = {(found["kind"], found["metadata"]["name"]) for found in objects}
    for found in (*objects, *examples()):
        if found.get("kind") in ("RoleBinding", "ClusterRoleBinding"):
            roles = {name(role) for leaf in leaves() for role in build(leaf) if role["kind"].endswith("Role")}
            assert f"{found['roleRef']['kind']}/{found['roleRef']['name']}" in roles, name(found)
            accounts = [subject["name"] for subject in found["subjects"] if subject["kind"] == "ServiceAccount"]
            assert all(("ServiceAccount", account) in there for account in accounts), name(found)
        if found.get("kind") == "Role":
            for rule in found["rules"]:
                assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], name(found)
                tokens = {cluster["metadata"]["name"] for cluster in objects if cluster["kind"] == "RayCluster"}
                secrets = set(rule.get("resourceNames", [])) if "secrets" in rule["resources"] else tokens
                assert secrets, f"{name(found)} reads all Secrets"
                assert secrets <= tokens, f"{name(found)} reads {secrets}, which KubeRay does not make"


@functools.cache
def all_pods() -> tuple[Pod, ...]:
    return tuple(pod for leaf in leaves() for found in build(leaf) for pod in pods(found))


def selectors(found: Object) -> Iterator[Mapping[str, Any]]:
    """Of pods in our namespace."""
    spec = found.get("spec", {})
    if found["kind"] in ("PodDisruptionBudget", "PodMonitor"):
        yield spec["selector"]
    if found["kind"] == "Service" and "selector" in spec:
        yield {"matchLabels": spec["selector"]}
    if found["kind"] == "NetworkPolicy":
        yield spec["podSelector"]
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield peer["podSelector"]


def test_selectors_find_pods(objects: tuple[Object, ...]) -> None:
    wrong = {
        name(found): selector
        for found in objects
        for selector in selectors(found)
        if not any(selects(selector, pod.labels) for pod in all_pods())
    }
    assert wrong == {}


def test_monitors_and_budgets_are_of_our_namespace(objects: tuple[Object, ...]) -> None:
    for found in objects:
        if found["kind"] == "PodMonitor":
            names = found["spec"].get("namespaceSelector", {}).get("matchNames", [NAMESPACE])
            assert names == [NAMESPACE], name(found)


def test_ports_are_those_that_something_listens_at(objects: tuple[Object, ...]) -> None:
    found = {
        (pod.owner, port["name"]): port["containerPort"]
        for part in objects
        for pod in pods(part)
        for port in pod.main.get("ports", [])
    }
    assert {key: port for key, port in found.items() if PORTS.get(key[1]) != port} == {}


def test_nodes_have_the_ports_that_kuberay_looks_for(objects: tuple[Object, ...]) -> None:
    """With any port given KubeRay adds none but `metrics`: its services are of what is named."""
    for pod in (pod for part in objects for pod in pods(part)):
        named = {port["name"] for port in pod.main.get("ports", [])}
        wanted = {"head": {"gcs-server", "dashboard", "metrics"}, "worker": {"metrics"}}.get(pod.role, set())
        serves = {"serve"} if "RayService/" in pod.owner else set()
        assert wanted | serves <= named, pod.owner


def test_probes_ask_what_answers(objects: tuple[Object, ...]) -> None:
    wanted = {AGENT: "/api/healthz", DEFAULT_HTTP_PORT: "/-/healthz"}
    for pod in (pod for part in objects for pod in pods(part)):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = pod.main.get(kind, {}).get("httpGet")
            if asked:
                assert wanted.get(asked["port"]) == asked["path"], (pod.owner, kind)
        if pod.owner == "RayService/images serve":
            assert pod.main["readinessProbe"]["httpGet"]["port"] == DEFAULT_HTTP_PORT, (
                "KubeRay leaves our probe as it is"
            )


def test_network_policies_open_ports_that_pods_have(objects: tuple[Object, ...]) -> None:
    for found in objects:
        if found["kind"] != "NetworkPolicy":
            continue
        selected = [pod for pod in all_pods() if selects(found["spec"]["podSelector"], pod.labels)]
        there = {part for pod in selected for port in pod.main.get("ports", []) for part in port.values()}
        opened = {port["port"] for rule in found["spec"].get("ingress", []) for port in rule.get("ports", [])}
        assert opened <= there, name(found)


def test_monitors_scrape_ports_that_pods_have(objects: tuple[Object, ...]) -> None:
    for found in objects:
        if found["kind"] == "PodMonitor":
            selected = [pod for pod in all_pods() if selects(found["spec"]["selector"], pod.labels)]
            for endpoint in found["spec"]["podMetricsEndpoints"]:
                named = [port["name"] for pod in selected for port in pod.main.get("ports", [])]
                assert endpoint["port"] in named, endpoint


def test_parameters_of_ray_start_are_its_flags(objects: tuple[Object, ...]) -> None:
    flags = {flag.removeprefix("--") for parameter in start.params for flag in parameter.opts}
    for pod in (pod for part in objects for pod in pods(part)):
        params = pod.group.get("rayStartParams") or {}
        assert set(params) <= flags, pod.owner
        # what KubeRay and our policies take for granted
        assert not {"port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port"} & set(params), (
            pod.owner
        )


def test_variables_of_ray_are_read_by_it(everything: Mapping[str, tuple[Object, ...]]) -> None:
    named = {
        entry["name"]
        for part in (part for objects in everything.values() for part in objects)
        for pod in pods(part)
        for container in pod.containers
        for entry in container.get("env", [])
        if entry["name"].startswith("RAY_")
    }
    assert named, "no variable of Ray is set anywhere"
    assert {variable for variable in named if not is_read_by_ray(variable)} == set()


def test_a_variable_that_ray_does_not_read_is_seen() -> None:
    assert is_read_by_ray("RAY_worker_niceness")
    assert is_read_by_ray("RAY_AUTH_MODE")
    assert not is_read_by_ray("RAY_worker_nicenes")
    assert not is_read_by_ray("RAY_AUTH_MODES")


def is_read_by_ray(variable: str) -> bool:
    """Settings of the core are compiled in, without the prefix; the others stand in full somewhere in Python."""
    if variable in _named_in_python():
        return True
    compiled = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    with compiled.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        return binary.find(f"\0{variable.removeprefix('RAY_')}\0".encode()) >= 0


@functools.cache
def _named_in_python() -> frozenset[str]:
    files = Path(ray.__file__).parent.rglob("*.py")
    return frozenset(word for file in files for word in re.findall(r"\bRAY_\w+", file.read_text(errors="ignore")))


def test_ray_labels_that_are_asked_for_are_carried(objects: tuple[Object, ...]) -> None:
    for found in objects:
        spec = cluster_spec(found)
        if spec is None:
            continue
        for group in spec["workerGroupSpecs"]:
            assert group.get("labels") == {"unclip/group": group["groupName"]}, name(found)
        for label in asked_labels(found):
            assert label in [f"unclip/group: {group['groupName']}" for group in spec["workerGroupSpecs"]], name(found)


def asked_labels(found: Object) -> list[str]:
    text = found["spec"].get("entrypoint", "") + found["spec"].get("serveConfigV2", "")
    return [f"unclip/group: {part.split('}')[0].strip()}" for part in text.split("unclip/group:")[1:]]


@pytest.fixture
def queues() -> dict[str, Object]:
    return {name(found): found for found in build("overlays/kueue") if "kueue" in found["apiVersion"]}


def test_queues_lead_to_flavors(queues: Mapping[str, Object]) -> None:
    for found in queues.values():
        if found["kind"] == "LocalQueue":
            assert f"ClusterQueue/{found['spec']['clusterQueue']}" in queues
        if found["kind"] == "ClusterQueue":
            assert selects(found["spec"]["namespaceSelector"], {"kubernetes.io/metadata.name": NAMESPACE})
            for group in found["spec"]["resourceGroups"]:
                for flavor in group["flavors"]:
                    assert f"ResourceFlavor/{flavor['name']}" in queues
                    assert [part["name"] for part in flavor["resources"]] == group["coveredResources"]


def test_four_of_every_queued_job_fit_the_quota(queues: Mapping[str, Object]) -> None:
    for job in build("overlays/kueue/jobs"):
        queue = queues[f"LocalQueue/{job['metadata']['labels']['kueue.x-k8s.io/queue-name']}"]
        cluster_queue = queues[f"ClusterQueue/{queue['spec']['clusterQueue']}"]
        quota = {
            part["name"]: quantity(part["nominalQuota"])
            for group in cluster_queue["spec"]["resourceGroups"]
            for flavor in group["flavors"]
            for part in flavor["resources"]
        }
        for resource, asked in requests_of(job).items():
            assert 4 * asked <= quota.get(resource, 0), f"{name(job)} asks for {asked} {resource}"


def requests_of(job: Object) -> dict[str, Any]:
    """Of all pods of a job, as many as its groups have."""
    total: dict[str, Any] = {}
    for pod in pods(job):
        for container in pod.containers:
            for resource, asked in container["resources"]["requests"].items():
                total[resource] = total.get(resource, 0) + pod.group.get("replicas", 1) * quantity(asked)
    return total
