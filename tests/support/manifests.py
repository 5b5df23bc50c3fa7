"""The manifests of k8s/ as kustomize renders them, and the pods that Kubernetes and KubeRay 1.7 make of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
NAMESPACE = "unclip"
CUSTOM_GROUPS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com")
"""API groups that come with an operator; what is in any other group is Kubernetes' own."""

Object = Mapping[str, Any]
Role = Literal["head", "worker", "submitter", "plain"]

_GENERATED = "-xxxxx"  # stands for what KubeRay appends to the name of a RayService's or RayJob's cluster
_SUFFIXES = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


@dataclass(frozen=True)
class Pod:
    """A pod as it will be, as far as that is known from the manifests."""

    owner: str
    """Where it is written, as in `RayCluster/unclip train`."""
    role: Role
    labels: Mapping[str, str]
    """Those of the template and those that KubeRay adds."""
    spec: Mapping[str, Any]
    group: Mapping[str, Any] = field(default_factory=dict)
    """Head or worker group of the cluster; empty for other pods."""
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """RayClusterSpec that it belongs to."""

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All of them, init containers and the autoscaler's overrides among them."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"], *self._autoscaler()]

    @property
    def main(self) -> Mapping[str, Any]:
        """The container that KubeRay starts Ray, or the submission, in."""
        container: Mapping[str, Any] = self.spec["containers"][0]
        return container

    @property
    def env(self) -> dict[str, str]:
        """Values that stand in the main container's environment; those from elsewhere are left out."""
        return {entry["name"]: entry["value"] for entry in self.main.get("env", []) if "value" in entry}

    def _autoscaler(self) -> list[Mapping[str, Any]]:
        if self.role != "head" or not self.cluster.get("enableInTreeAutoscaling"):
            return []
        options = self.cluster.get("autoscalerOptions", {})
        taken = ("resources", "env", "envFrom", "volumeMounts", "securityContext", "image")
        image = {"image": self.main["image"]}
        return [{"name": "autoscaler", **image, **{key: options[key] for key in taken if key in options}}]


def kustomize() -> list[str]:
    """The command that renders a folder; skips the test where there is none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    pytest.skip("neither kubectl nor kustomize is on PATH: no manifest is checked")


@functools.cache
def kustomizations() -> dict[str, Mapping[str, Any]]:
    """Every kustomization.yaml by its folder, relative to k8s/."""
    return {
        str(file.parent.relative_to(K8S)): yaml.safe_load(file.read_text())
        for file in sorted(K8S.rglob("kustomization.yaml"))
    }


@functools.cache
def leaves() -> tuple[str, ...]:
    """What is applied: kustomizations that are no other's source, and those with a component more that is an option of theirs.

    An option is a component that none of them takes, as in `overlays/gpu-h100+rdma`. It belongs to those that mention it in a
    comment, or to the platform where none does.
    """
    sources = {path for folder, found in kustomizations().items() for path in referred(folder, found, "resources")}
    folders = [
        folder
        for folder, found in kustomizations().items()
        if found["kind"] == "Kustomization" and (folder not in sources or folder.startswith("overlays/"))
    ]
    taken = {path for folder in folders for path in referred(folder, kustomizations()[folder], "components")}
    options = [folder for folder in kustomizations() if folder.startswith("components/") and folder not in taken]
    with_option = []
    for option in options:
        mention = [folder for folder in folders if option in (K8S / folder / "kustomization.yaml").read_text()]
        with_option += [f"{folder}+{option.removeprefix('components/')}" for folder in mention or ["platform"]]
    return (*folders, *with_option)


def referred(folder: str, kustomization: Mapping[str, Any], kind: str) -> list[str]:
    """The folders and files, relative to k8s/, that a kustomization names as its `resources` or `components`."""
    return [os.path.normpath(os.path.join(folder, entry)) for entry in kustomization.get(kind, [])]


@functools.cache
def build(leaf: str) -> tuple[Object, ...]:
    """The objects that `kubectl apply -k` would send. They are shared: change copies."""
    folder, _, option = leaf.partition("+")
    with tempfile.TemporaryDirectory() as copy:
        root = _with_option(Path(copy), folder, option) if option else K8S
        done = subprocess.run([*kustomize(), str(root / folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{leaf}: {done.stderr}"
    return tuple(load(done.stdout))


def _with_option(copy: Path, folder: str, option: str) -> Path:
    """A copy of k8s/ where the kustomization in `folder` takes a component more, before it is assembled."""
    root = shutil.copytree(K8S, copy / "k8s")
    kustomization = dict(kustomizations()[folder])
    components = list(kustomization["components"])
    place = referred(folder, kustomization, "components").index("assemble")
    components.insert(place, os.path.relpath(K8S / "components" / option, K8S / folder))
    (root / folder / "kustomization.yaml").write_text(yaml.safe_dump({**kustomization, "components": components}))
    return root


def load(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def platform_of(leaf: str) -> str:
    """The leaf whose objects surround those of `leaf`: jobs run beside the platform of their overlay."""
    folder, plus, option = leaf.partition("+")
    around = folder.removesuffix("/jobs") if folder.startswith("overlays/") else "platform"
    return around + plus + option


def surroundings(leaf: str) -> list[Object]:
    """The leaf's objects and the platform's."""
    around = platform_of(leaf)
    return [*build(leaf), *(build(around) if around != leaf else ())]


def name(found: Object) -> str:
    """As in `RayJob/embed`."""
    return f"{found['kind']}/{found['metadata']['name']}"


def cluster_spec(found: Object) -> Mapping[str, Any] | None:
    """The RayClusterSpec inside of a RayCluster, RayJob or RayService."""
    path = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}.get(found["kind"])
    if path is None:
        return None
    spec = found["spec"]
    for key in path:
        spec = spec.get(key)
    return spec


def pods(found: Object) -> Iterator[Pod]:
    """The pods that come of one object."""
    cluster = cluster_spec(found)
    if cluster is not None:
        yield from _ray_pods(found, cluster)
    if found["kind"] == "RayJob" and "submitterPodTemplate" in found["spec"]:
        template = found["spec"]["submitterPodTemplate"]
        labels = {
            **template.get("metadata", {}).get("labels", {}),
            "ray.io/originated-from-cr-name": found["metadata"]["name"],
            "ray.io/originated-from-crd": "RayJob",
            "app.kubernetes.io/created-by": "kuberay-operator",
        }
        yield Pod(f"{name(found)} submitter", "submitter", labels, template["spec"])
    template = _plain_template(found)
    if template is not None:
        yield Pod(name(found), "plain", template.get("metadata", {}).get("labels", {}), template["spec"])


def _ray_pods(found: Object, cluster: Mapping[str, Any]) -> Iterator[Pod]:
    cluster_name = found["metadata"]["name"] + ("" if found["kind"] == "RayCluster" else _GENERATED)
    groups: list[tuple[Role, str, Mapping[str, Any]]] = [("head", "headgroup", cluster["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    for role, group_name, group in groups:
        labels = {
            "ray.io/is-ray-node": "yes",
            "ray.io/identifier": f"{cluster_name}-{role}",
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
            **group["template"].get("metadata", {}).get("labels", {}),
            **group.get("labels", {}),
            "ray.io/cluster": cluster_name,
            "ray.io/node-type": role,
            "ray.io/group": group_name,
        }
        if found["kind"] == "RayService":
            labels["ray.io/serve"] = "false" if role == "head" else "true"
        owner = f"{name(found)} {group_name if role == 'worker' else 'head'}"
        yield Pod(owner, role, labels, group["template"]["spec"], group, cluster)


def _plain_template(found: Object) -> Mapping[str, Any] | None:
    """Of Kubernetes' own kinds that make pods."""
    if found["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        return found["spec"]["template"]
    if found["kind"] == "CronJob":
        return found["spec"]["jobTemplate"]["spec"]["template"]
    return found if found["kind"] == "Pod" else None


def quantity(value: str | int | float) -> Decimal:
    """A Kubernetes quantity, as `500m` or `16Gi`, as a number."""
    parts = re.fullmatch(r"([+-]?[0-9.]+)(?:([numkMGTPE]?)|([KMGTPE])i|[eE]([+-]?[0-9]+))", str(value))
    if parts is None:
        raise ValueError(f"{value!r} is no quantity")
    number, decimal, binary, exponent = parts.groups()
    if binary:
        return Decimal(number) * 1024 ** (_SUFFIXES["k" if binary == "K" else binary])
    if exponent:
        return Decimal(number) * Decimal(10) ** int(exponent)
    return Decimal(number) * Decimal(1000) ** _SUFFIXES[decimal or ""]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector takes something with `labels`."""
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]
