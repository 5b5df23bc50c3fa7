"""Every object against the schema that its API server has: unknown fields, types, enums, formats and rules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.support.crds import Crds
from tests.support.manifests import CUSTOM_GROUPS, K8S, Object, build, leaves, load, name

OLDEST_KUBERNETES = "1.30"
"""The oldest that docs/kubernetes.md promises."""
VERSIONS = (OLDEST_KUBERNETES, kubernetes_validate.latest_version())

_checked: dict[tuple[str, str], list[str]] = {}


def core_problems(found: Object, version: str) -> list[str]:
    """What Kubernetes' own schema says; overlays have most of their objects in common, which are looked at once."""
    key = (json.dumps(found, sort_keys=True, default=str), version)
    if key not in _checked:
        try:
            kubernetes_validate.validate(dict(found), version, strict=True)
            _checked[key] = []
        except kubernetes_validate.ValidationError as error:
            _checked[key] = [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
        except kubernetes_validate.SchemaNotFoundError as error:
            _checked[key] = [error.message]
    return _checked[key]


def is_custom(found: Object) -> bool:
    return found["apiVersion"].partition("/")[0] in CUSTOM_GROUPS


def with_metadata(found: Object) -> Object:
    """An object of Kubernetes with the metadata of a custom one, which its definition says nothing of."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_its_own_objects(objects: tuple[Object, ...], version: str) -> None:
    plain = [with_metadata(found) if is_custom(found) else found for found in objects]
    found = {name(shown): core_problems(checked, version) for shown, checked in zip(objects, plain, strict=True)}
    assert {key: problems for key, problems in found.items() if problems} == {}


def test_kuberay_takes_its_objects(objects: tuple[Object, ...], crds: Crds) -> None:
    found = {name(found): crds.problems(found) for found in objects if found["apiVersion"].startswith("ray.io/")}
    assert {key: problems for key, problems in found.items() if problems} == {}


@pytest.mark.parametrize("group", [group for group in CUSTOM_GROUPS if group != "ray.io"])
def test_other_operators_take_their_objects(crds: Crds, group: str) -> None:
    objects = [found for leaf in leaves() for found in build(leaf) if found["apiVersion"].startswith(group + "/")]
    assert objects, f"nothing of {group} is rendered"
    if not crds.know(group):
        pytest.skip(f"no definitions of {group}: give their folder by --crds")
    found = {name(found): crds.problems(found) for found in objects}
    assert {key: problems for key, problems in found.items() if problems} == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_examples_are_objects_of_kubernetes(version: str) -> None:
    files = sorted((K8S / "examples").rglob("*.yaml"))
    objects = [found for file in files for found in load(file.read_text()) if found.get("kind") != "Kustomization"]
    assert objects, "no examples"
    found = {name(found): core_problems(found, version) for found in objects if not is_custom(found)}
    assert {key: problems for key, problems in found.items() if problems} == {}


# That the checks see what they are for: a good object, and one broken in each way.

CONTAINER = {"name": "ray", "image": "unclip", "ports": [{"name": "metrics", "containerPort": 8080}]}
JOB: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "embed"},
    "spec": {
        "entrypoint": "python jobs/embed.py",
        "submissionMode": "K8sJobMode",
        "rayClusterSpec": {
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": {"containers": [CONTAINER]}}},
            "workerGroupSpecs": [
                {
                    "groupName": "data",
                    "minReplicas": 0,
                    "maxReplicas": 4,
                    "rayStartParams": {},
                    "template": {"spec": {"containers": [CONTAINER]}},
                }
            ],
        },
    },
}
CLUSTER = ("spec", "rayClusterSpec")
POD = (*CLUSTER, "workerGroupSpecs", 0, "template", "spec")
RESOURCES = (*POD, "containers", 0, "resources")
PORTS = (*POD, "containers", 0, "ports")


def put(found: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value at `path`."""
    changed = copy.deepcopy(found)
    place = changed
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = value
    return changed


def test_a_good_object_has_no_problems(crds: Crds) -> None:
    good = put(put(JOB, RESOURCES, {"limits": {"cpu": 1, "memory": "2Gi"}}), (*CLUSTER, "rayVersion"), "2.60.0")
    assert crds.problems(good) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*CLUSTER, "rayversion"), "2.60.0", "unknown field 'rayversion'"),
        (("status2",), {}, "unknown field 'status2'"),
        ((*POD, "containers", 0, "imagePullPolice"), "Always", "unknown field 'imagePullPolice'"),
        ((*CLUSTER, "workerGroupSpecs", 0, "template", "metadata"), {"label": {}}, "unknown field 'label'"),
        ((*CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), "4", "'4' is not of type 'integer'"),
        ((*CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), 2**31, "int32"),
        ((*CLUSTER, "enableInTreeAutoscaling"), "true", "'true' is not of type 'boolean'"),
        ((*CLUSTER, "workerGroupSpecs", 0, "rayStartParams"), {"num-cpus": 0}, "0 is not of type 'string'"),
        ((*CLUSTER, "workerGroupSpecs", 0, "rayStartParams"), None, "None is not of type 'object'"),
        (("spec", "ttlSecondsAfterFinished"), 1.5, "1.5 is not of type 'integer'"),
        ((*POD, "containers"), [{"image": "unclip"}], "'name' is a required property"),
        (RESOURCES, {"limits": {"memory": "2 Gi"}}, "'2 Gi' does not match"),
        (RESOURCES, {"limits": {"memory": "2GB"}}, "'2GB' does not match"),
        (RESOURCES, {"limits": {"memory": True}}, "True is neither an integer nor a string"),
        ((*CLUSTER, "autoscalerOptions"), {"version": "v3"}, "'v3' is not one of"),
        ((*CLUSTER, "autoscalerOptions"), {"upscalingMode": "Fast"}, "'Fast' is not one of"),
        ((*CLUSTER, "authOptions"), {"mode": "password"}, "'password' is not one of"),
        (PORTS, [{"containerPort": 8080}, {"containerPort": 8080, "protocol": "TCP"}], "two items with"),
        (("spec", "managedBy"), "me", "must be either 'ray.io/kuberay-operator'"),
        (("spec", "deletionStrategy"), {}, "requires either BOTH onSuccess and onFailure"),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 60}}]},
            "requires either the JobStatus",
        ),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{"policy": "DeleteAll", "condition": {"jobStatus": "FAILED"}}]},
            "'DeleteAll' is not one of",
        ),
    ],
)
def test_a_broken_custom_resource_is_refused(crds: Crds, path: tuple[str | int, ...], value: Any, said: str) -> None:
    assert [problem for problem in crds.problems(put(JOB, path, value)) if said in problem]


def test_a_wrong_kind_or_version_is_refused(crds: Crds) -> None:
    assert crds.problems({**JOB, "kind": "RayJobs"}) == ["no RayJobs in ray.io/v1"]
    assert crds.problems({**JOB, "apiVersion": "ray.io/v2"}) == ["no RayJob in ray.io/v2"]


BUDGET = yaml.safe_load("""
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: serve}
spec: {maxUnavailable: 1, selector: {matchLabels: {ray.io/group: serve}}}
""")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda found: put(found, ("spec", "maxUnavailble"), 1),
        lambda found: put(found, ("spec", "maxUnavailable"), [1]),
        lambda found: put(found, ("metadata", "label"), {}),
        lambda found: {**found, "apiVersion": "policy/v2"},
        lambda found: {**found, "kind": "PodDisruptionBudgets"},
    ],
)
def test_a_broken_core_object_is_refused(change: Callable[[Any], Any], version: str) -> None:
    assert core_problems(BUDGET, version) == []
    assert core_problems(change(BUDGET), version)
