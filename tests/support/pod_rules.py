"""What the API server refuses in a pod's template although its schema allows it, and names that lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.support.kuberay_rules import is_label
from tests.support.manifests import Pod, quantity

HANDLERS = {"exec", "httpGet", "tcpSocket", "grpc"}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_PORT = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")

Spec = Mapping[str, Any]


def problems(pod: Pod) -> list[str]:
    """Of a pod's template, each with its place."""
    found = [*_labels(pod), *_volumes(pod), *_tolerations(pod.spec), *_restarts(pod), *_unique_ports(pod)]
    for container in pod.containers:
        checks = (_container_names, _environment, _probes, _resources)
        found += [f"{container['name']}: {problem}" for check in checks for problem in check(container)]
    return [f"{pod.owner}: {problem}" for problem in found]


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def _labels(pod: Pod) -> Iterator[str]:
    for key, value in [*pod.labels.items(), *pod.spec.get("nodeSelector", {}).items()]:
        if not isinstance(value, str) or not is_label(key, value):
            yield f"{key}: {value} is no label"


def _volumes(pod: Pod) -> Iterator[str]:
    volumes = pod.spec.get("volumes", [])
    names = [volume["name"] for volume in volumes]
    mounts = [(container["name"], mount) for container in pod.containers for mount in container.get("volumeMounts", [])]
    # where the autoscaler is off, what its options mount stays in the pod
    autoscaler = pod.cluster.get("autoscalerOptions", {}).get("volumeMounts", [])
    mounted = {mount["name"] for mount in [*autoscaler, *(mount for _, mount in mounts)]}
    yield from (f"two volumes {name}" for name in _repeated(names))
    for volume in volumes:
        if len(set(volume) - {"name"}) != 1:
            yield f"volume {volume['name']} has not exactly one source"
        if volume["name"] not in mounted:
            yield f"volume {volume['name']} is mounted nowhere"
    for container, mount in mounts:
        if mount["name"] not in names:
            yield f"{container}: mounts {mount['name']}, which is no volume"
    paths = [(container, mount["mountPath"]) for container, mount in mounts]
    yield from (f"{container}: two volumes at {path}" for container, path in _repeated(paths))


def _tolerations(spec: Spec) -> Iterator[str]:
    for toleration in spec.get("tolerations", []):
        exists = toleration.get("operator", "Equal") == "Exists"
        if exists and "value" in toleration:
            yield f"toleration of {toleration.get('key')} has a value beside Exists"
        if not exists and not toleration.get("key"):
            yield "a toleration without a key is not Exists"
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield f"toleration of {toleration.get('key')} has tolerationSeconds without NoExecute"


def _restarts(pod: Pod) -> Iterator[str]:
    if pod.role == "submitter" and pod.spec.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "restartPolicy of a Job's pod is neither Never nor OnFailure"


def _unique_ports(pod: Pod) -> Iterator[str]:
    ports = [port for container in pod.spec["containers"] for port in container.get("ports", [])]
    yield from (f"two ports {name}" for name in _repeated([port["name"] for port in ports if "name" in port]))
    yield from (f"two ports {number}" for number in _repeated([port["containerPort"] for port in ports]))


def _container_names(container: Spec) -> Iterator[str]:
    if not _LABEL.fullmatch(container["name"]):
        yield "is no name of a container"
    for port in container.get("ports", []):
        if not _PORT.fullmatch(port.get("name", "a")):
            yield f"{port['name']} is no name of a port"
        if not 0 < port["containerPort"] < 65536:
            yield f"{port['containerPort']} is no port"


def _environment(container: Spec) -> Iterator[str]:
    entries = container.get("env", [])
    yield from (f"two values of {name}" for name in _repeated([entry["name"] for entry in entries]))
    for entry in entries:
        if "value" in entry and "valueFrom" in entry:
            yield f"{entry['name']} has value and valueFrom"


def _probes(container: Spec) -> Iterator[str]:
    names = {port.get("name") for port in container.get("ports", [])}
    for kind in PROBES:
        probe = container.get(kind)
        if probe is None:
            continue
        handlers = HANDLERS & set(probe)
        if len(handlers) != 1:
            yield f"{kind} has not exactly one handler"
            continue
        port = probe[handlers.pop()].get("port")
        if isinstance(port, str) and port not in names:
            yield f"{kind} asks port {port}, which the container does not have"
        if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"{kind} has a successThreshold other than 1"


def _resources(container: Spec) -> Iterator[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for key, request in requests.items():
        if key in limits and quantity(request) > quantity(limits[key]):
            yield f"requests more {key} than its limit"
    for key in {*requests, *limits}:
        if "/" not in key and not key.startswith("hugepages-"):
            continue
        if key not in limits or quantity(requests.get(key, limits[key])) != quantity(limits[key]):
            yield f"limit of {key} is not its request"
        elif quantity(limits[key]) % 1:
            yield f"{key} is no whole number"
