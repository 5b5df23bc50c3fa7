"""Every pod that comes of the manifests: valid, restricted, with room for what Ray does, and time to end."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from tests.support import pod_rules
from tests.support.manifests import Object, Pod, cluster_spec, name, pods, quantity
from tests.support.pod_security import violations

SECRET_NAME = re.compile(r"(?i)(secret|password|passwd|token|credential|private|access_?key)")
SECRET_VALUE = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{16}|eyJ[\w-]{10,}|-----BEGIN|gh[pousr]_\w{20,}|hf_\w{20,}|[A-Za-z0-9+/=]{40,}"
)
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def all_pods(objects: tuple[Object, ...]) -> list[Pod]:
    return [pod for found in objects for pod in pods(found)]


def ray_pods(objects: tuple[Object, ...]) -> list[Pod]:
    return [pod for pod in all_pods(objects) if pod.role in ("head", "worker")]


def test_the_api_server_takes_them(objects: tuple[Object, ...]) -> None:
    assert [problem for pod in all_pods(objects) for problem in pod_rules.problems(pod)] == []


def test_they_are_restricted(objects: tuple[Object, ...]) -> None:
    assert [violation for pod in all_pods(objects) for violation in violations(pod)] == []


def test_namespaces_enforce_it(objects: tuple[Object, ...]) -> None:
    levels = {
        name(found): found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        for found in objects
        if found["kind"] == "Namespace"
    }
    assert set(levels.values()) <= {"restricted"}, levels


def test_root_file_systems_are_read_only(objects: tuple[Object, ...]) -> None:
    contexts = [
        (pod.owner, container["name"], container.get("securityContext", {}))
        for pod in all_pods(objects)
        for container in pod.containers
    ]
    assert [place for *place, context in contexts if context.get("readOnlyRootFilesystem") is not True] == []


def test_memory_is_requested_as_it_is_limited(objects: tuple[Object, ...]) -> None:
    found = []
    for pod in all_pods(objects):
        for container in pod.containers:
            resources = container.get("resources", {})
            request, limit = (resources.get(kind, {}).get("memory", "0") for kind in ("requests", "limits"))
            if not quantity(limit) or quantity(request) != quantity(limit):
                found.append(f"{pod.owner} {container['name']}: requests {request}, limit {limit}")
            if not quantity(resources.get("requests", {}).get("cpu", "0")):
                found.append(f"{pod.owner} {container['name']}: requests no CPUs")
    assert found == []


def test_ray_containers_have_probes(objects: tuple[Object, ...]) -> None:
    found = {pod.owner: [kind for kind in pod_rules.PROBES if kind not in pod.main] for pod in ray_pods(objects)}
    assert {owner: missing for owner, missing in found.items() if missing} == {}


def test_only_autoscalers_have_a_token_of_kubernetes(objects: tuple[Object, ...]) -> None:
    """Everything else in a pod may run what users submit."""
    automatic = [pod.owner for pod in all_pods(objects) if pod.spec.get("automountServiceAccountToken") is not False]
    assert automatic == []
    found = {(pod.owner, container["name"]) for pod in all_pods(objects) for container in token_mounts(pod)}
    assert found == {(pod.owner, "autoscaler") for pod in all_pods(objects) if scales(pod)}


def token_mounts(pod: Pod) -> list[Mapping[str, Any]]:
    """The containers that mount a token of the pod's service account."""
    volumes = {
        volume["name"]
        for volume in pod.spec.get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }
    return [
        container
        for container in pod.containers
        if volumes & {mount["name"] for mount in container.get("volumeMounts", [])}
    ]


def scales(pod: Pod) -> bool:
    return pod.role == "head" and bool(pod.cluster.get("enableInTreeAutoscaling"))


def test_objects_spill_to_a_volume_of_bounded_size(objects: tuple[Object, ...]) -> None:
    found = []
    for pod in ray_pods(objects):
        folder = spill_folder(pod)
        volume = volume_at(pod, folder) if folder else None
        if volume is None or not ("persistentVolumeClaim" in volume or volume.get("emptyDir", {}).get("sizeLimit")):
            found.append(f"{pod.owner}: spills to {folder} on {volume}")
    assert found == []


def spill_folder(pod: Pod) -> str | None:
    """The head decides for all nodes."""
    params = pod.cluster["headGroupSpec"].get("rayStartParams", {})
    return params.get("object-spilling-directory")


def volume_at(pod: Pod, path: str) -> Mapping[str, Any] | None:
    """The volume that a path of the Ray container is on; null where it is the container's own file system."""
    mounts = [m for m in pod.main.get("volumeMounts", []) if f"{path}/".startswith(m["mountPath"].rstrip("/") + "/")]
    if not mounts:
        return None
    mount = max(mounts, key=lambda found: len(found["mountPath"]))
    return next(volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])


def test_the_object_store_has_shared_memory(objects: tuple[Object, ...]) -> None:
    """KubeRay mounts /dev/shm as large as the container's memory; an own volume has to hold the object store."""
    found = []
    for pod in ray_pods(objects):
        params = pod.group.get("rayStartParams") or {}
        memory = quantity(pod.main["resources"]["limits"]["memory"])
        own = volume_at(pod, "/dev/shm")
        room = quantity(own["emptyDir"].get("sizeLimit", "0")) if own else memory
        store = quantity(params["object-store-memory"]) if "object-store-memory" in params else Decimal("0.3") * memory
        if own and own["emptyDir"].get("medium") != "Memory":
            found.append(f"{pod.owner}: /dev/shm is not in memory")
        if "plasma-directory" in params or not 0 < store <= min(room, memory * Decimal("0.6")):
            found.append(f"{pod.owner}: an object store of {store} in {room} of {memory} bytes")
    assert found == []


def test_pods_have_time_to_drain(objects: tuple[Object, ...]) -> None:
    found = []
    for pod in ray_pods(objects):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        drain = float(pod.env.get(DRAIN, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
        if not 0 < drain < grace:
            found.append(f"{pod.owner}: drains for {drain} s of {grace} s")
    assert found == []


def test_no_secret_stands_in_a_manifest(objects: tuple[Object, ...]) -> None:
    texts = [
        (f"{pod.owner} {container['name']}", entry["name"], entry["value"])
        for pod in all_pods(objects)
        for container in pod.containers
        for entry in container.get("env", [])
        if "value" in entry
    ]
    for found in objects:
        if found["kind"] == "ConfigMap" and "grafana_dashboard" not in found["metadata"]["labels"]:
            texts += [(name(found), key, value) for key, value in found.get("data", {}).items()]
    wrong = [
        place[:2]
        for place in texts
        if (SECRET_NAME.search(place[1]) and "/" not in place[2]) or SECRET_VALUE.search(place[2])
    ]
    assert wrong == []
    assert [name(found) for found in objects if found["kind"] == "Secret"] == []


def test_pods_that_are_replaced_are_pulled_from_the_same_image(objects: tuple[Object, ...]) -> None:
    """Ray wants one version in a cluster: a tag that moves while the autoscaler adds nodes breaks it."""
    for found in objects:
        if cluster_spec(found) is not None:
            images = {container["image"] for pod in pods(found) for container in pod.containers}
            assert len(images) == 1, f"{name(found)}: {images}"


# That the checks see what they are for.

CONTEXT = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
GOOD = {
    "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "containers": [
        {
            "name": "ray",
            "image": "unclip",
            "securityContext": CONTEXT,
            "env": [{"name": "A", "value": "1"}],
            "ports": [{"name": "metrics", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"port": "metrics", "path": "/"}},
            "resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi", "nvidia.com/gpu": 1}},
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
}
HTTP_GET = {"port": 8080, "path": "/"}


def pod_with(path: str, value: Any) -> Pod:
    """The good pod with another value at a dotted path; `c` is its container."""
    spec: Any = copy.deepcopy(GOOD)
    place, keys = spec, path.replace("c.", "containers.0.", 1).split(".") if path.startswith("c.") else path.split(".")
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[keys[-1]] = value
    return Pod("Pod/x", "worker", {}, spec)


def test_a_good_pod_has_no_problems() -> None:
    pod = Pod("Pod/x", "worker", {"unclip/group": "train"}, GOOD)
    assert (pod_rules.problems(pod), violations(pod)) == ([], [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hostNetwork", True),
        ("hostPID", True),
        ("hostIPC", True),
        ("volumes", [{"name": "tmp", "hostPath": {"path": "/"}}]),
        ("volumes", [{"name": "tmp", "nfs": {"server": "a", "path": "/"}}]),
        ("securityContext.runAsNonRoot", None),
        ("securityContext.runAsUser", 0),
        ("securityContext.seccompProfile", {"type": "Unconfined"}),
        ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
        ("securityContext.appArmorProfile", {"type": "Unconfined"}),
        ("securityContext.seLinuxOptions", {"type": "spc_t"}),
        ("securityContext.windowsOptions", {"hostProcess": True}),
        ("c.securityContext", {}),
        ("c.securityContext.privileged", True),
        ("c.securityContext.allowPrivilegeEscalation", True),
        ("c.securityContext.runAsNonRoot", False),
        ("c.securityContext.runAsUser", 0),
        ("c.securityContext.capabilities", {"drop": ["NET_RAW"]}),
        ("c.securityContext.capabilities", {"drop": ["ALL"], "add": ["IPC_LOCK"]}),
        ("c.securityContext.seccompProfile", {"type": "Unconfined"}),
        ("c.securityContext.procMount", "Unmasked"),
        ("c.ports", [{"containerPort": 8080, "hostPort": 8080}]),
        ("c.livenessProbe", {"httpGet": {**HTTP_GET, "host": "10.0.0.1"}}),
    ],
)
def test_a_pod_that_is_not_restricted_is_seen(path: str, value: Any) -> None:
    assert violations(pod_with(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("nodeSelector", {"gpu": "a b"}, "is no label"),
        ("volumes", [], "mounts tmp, which is no volume"),
        ("volumes", [*GOOD["volumes"], {"name": "spill", "emptyDir": {}}], "spill is mounted nowhere"),
        ("volumes", [*GOOD["volumes"], *GOOD["volumes"]], "two volumes tmp"),
        ("volumes", [{"name": "tmp", "emptyDir": {}, "secret": {"secretName": "a"}}], "not exactly one source"),
        ("c.volumeMounts", [{"name": "tmp", "mountPath": "/tmp"}] * 2, "two volumes at /tmp"),
        ("tolerations", [{"key": "a", "operator": "Exists", "value": "b"}], "has a value beside Exists"),
        ("tolerations", [{"value": "b"}], "without a key"),
        ("tolerations", [{"key": "a", "operator": "Exists", "tolerationSeconds": 5}], "without NoExecute"),
        ("c.name", "Ray", "is no name of a container"),
        ("c.ports", [{"name": "metrics-of-this-pod", "containerPort": 8080}], "is no name of a port"),
        ("c.ports", [{"containerPort": 80800}], "is no port"),
        ("c.ports", [{"name": "a", "containerPort": 1}, {"name": "a", "containerPort": 2}], "two ports a"),
        ("c.env", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}], "two values of A"),
        ("c.env", [{"name": "A", "value": "1", "valueFrom": {}}], "value and valueFrom"),
        ("c.readinessProbe", {"httpGet": {"port": "http", "path": "/"}}, "which the container does not have"),
        ("c.readinessProbe", {"periodSeconds": 5}, "not exactly one handler"),
        ("c.livenessProbe", {"httpGet": HTTP_GET, "successThreshold": 2}, "successThreshold other than 1"),
        ("c.resources.requests.memory", "2Gi", "requests more memory"),
        ("c.resources.requests", {"nvidia.com/gpu": 2}, "limit of nvidia.com/gpu is not its request"),
        ("c.resources.limits", {"nvidia.com/gpu": "500m"}, "is no whole number"),
    ],
)
def test_a_pod_that_is_not_valid_is_seen(path: str, value: Any, said: str) -> None:
    assert [problem for problem in pod_rules.problems(pod_with(path, value)) if said in problem]
