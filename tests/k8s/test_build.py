"""What the folders of k8s/ render to: whole, assembled, labelled, in one namespace, of one image."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tests.support.kuberay_rules import is_label
from tests.support.manifests import (
    K8S,
    NAMESPACE,
    REPOSITORY,
    Object,
    build,
    cluster_spec,
    kustomizations,
    leaves,
    load,
    name,
    pods,
    referred,
)

CLUSTER_WIDE = {"ClusterQueue", "ClusterRole", "ClusterRoleBinding", "Namespace", "PriorityClass", "ResourceFlavor"}
RUNS = {
    "preflight",
    "ingest",
    "embed",
    "train-clip",
    "train-prior",
    "train-decoder",
    "train-upsampler-256",
    "train-upsampler-1024",
    "generate",
    "evaluate",
}
LOCAL_IMAGE = "unclip:cpu"
"""Of `cpu-local`, built on the machine and pulled from nowhere."""
PYTHON_OF_DEBIAN = {"bookworm": (3, 11), "trixie": (3, 13)}
PINNED_IMAGE = re.compile(r"[a-z0-9][\w.:/-]*/unclip@sha256:[0-9a-f]{64}")


def is_jobs(leaf: str) -> bool:
    return leaf.partition("+")[0].endswith("jobs")


def kinds(objects: tuple[Object, ...]) -> Counter[str]:
    return Counter(found["kind"] for found in objects)


def test_the_folders_that_the_project_promises_are_there() -> None:
    overlays = ("cpu-local", "gpu-single", "gpu-a100", "gpu-h100", "spot", "kueue", "s3-compatible")
    promised = {"platform", "jobs", "monitoring"}
    promised |= {f"overlays/{overlay}{jobs}" for overlay in overlays for jobs in ("", "/jobs")}
    options = {f"overlays/gpu-h100{jobs}+{option}" for option in ("rdma", "efa") for jobs in ("", "/jobs")}
    assert promised | options | {"platform+head-recovery"} <= set(leaves())


def test_every_source_is_used() -> None:
    named = {
        path
        for folder, found in kustomizations().items()
        for kind in ("resources", "components")
        for path in referred(folder, found, kind)
    }
    optional = {f"components/{leaf.partition('+')[2]}" for leaf in leaves() if "+" in leaf}
    assert set(kustomizations()) - named - optional - set(leaves()) == set()


def test_platform_yaml_is_what_the_platform_renders_to() -> None:
    assert load((K8S / "platform.yaml").read_text()) == list(build("platform")), "run `make manifests`"


def test_nothing_else_is_applied_with_the_folder() -> None:
    """`kubectl apply -f k8s/` takes every manifest that lies in the folder itself."""
    found = [file.name for file in K8S.iterdir() if file.suffix in (".yaml", ".yml", ".json")]
    assert found == ["platform.yaml"]


def test_sources_are_not_rendered(objects: tuple[Object, ...]) -> None:
    assert kinds(objects)["PodTemplate"] == 0


def test_platforms_have_the_cluster_and_the_server(leaf: str, objects: tuple[Object, ...]) -> None:
    found = [name(found) for found in objects if found["apiVersion"].startswith("ray.io/")]
    if is_jobs(leaf) or leaf == "monitoring":
        assert "RayCluster/unclip" not in found
    else:
        assert sorted(found) == ["RayCluster/unclip", "RayService/images"]


def test_jobs_are_rayjobs_that_are_started_by_their_label(leaf: str, objects: tuple[Object, ...]) -> None:
    jobs = {found["metadata"]["name"]: found for found in objects if found["kind"] == "RayJob"}
    demo = {"demo"} if leaf == "overlays/cpu-local/jobs" else set()
    assert set(jobs) == (RUNS | demo if is_jobs(leaf) else set())
    assert [key for key, job in jobs.items() if job["metadata"]["labels"].get("unclip/job") != key] == []
    assert len(objects) == len(jobs) or not is_jobs(leaf), "what is no RayJob has no such label, and is never applied"


def test_objects_are_unique_and_in_the_namespace(objects: tuple[Object, ...]) -> None:
    found = Counter((found["apiVersion"], name(found), found["metadata"].get("namespace")) for found in objects)
    assert [key for key, count in found.items() if count > 1] == []
    outside = {
        name(found)
        for found in objects
        if found["metadata"].get("namespace") != (None if found["kind"] in CLUSTER_WIDE else NAMESPACE)
    }
    assert outside == set()


def test_objects_are_labelled(objects: tuple[Object, ...]) -> None:
    for found in objects:
        labels = found["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/part-of") == "unclip", name(found)
        assert all(is_label(key, value) for key, value in labels.items()), name(found)


def test_clusters_have_every_part(objects: tuple[Object, ...]) -> None:
    groups = {"RayCluster": ["data", "train", "serve"], "RayJob": ["data", "train"], "RayService": ["serve"]}
    for found in objects:
        spec = cluster_spec(found)
        if spec is not None:
            assert [group["groupName"] for group in spec["workerGroupSpecs"]] == groups[found["kind"]], name(found)
            assert [pod.main["name"] for pod in pods(found)] == ["ray"] * len(list(pods(found))), name(found)


def test_every_container_has_the_one_image() -> None:
    images: dict[str, set[str]] = {}
    for leaf in leaves():
        local = leaf.startswith("overlays/cpu-local")
        for found in build(leaf):
            for pod in pods(found):
                for container in pod.containers:
                    images.setdefault("local" if local else "pinned", set()).add(container["image"])
    assert images["local"] == {LOCAL_IMAGE}
    assert len(images["pinned"]) == 1
    assert PINNED_IMAGE.fullmatch(images["pinned"].pop())


def test_the_digest_stands_in_one_place() -> None:
    found = [
        str(file.relative_to(K8S))
        for file in K8S.rglob("*.yaml")
        if re.search(r"sha256:[0-9a-f]{64}", file.read_text()) and file != K8S / "platform.yaml"
    ]
    assert found == ["image/pinned/kustomization.yaml"]


def pinned(package: str) -> str:
    line = re.search(rf"^{package}==([\w.]+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    assert line is not None
    return line[1]


def test_clusters_have_the_pinned_ray(objects: tuple[Object, ...]) -> None:
    """The operator reads `rayVersion` to know what the image can do."""
    versions = {name(found): spec["rayVersion"] for found in objects if (spec := cluster_spec(found)) is not None}
    assert set(versions.values()) <= {pinned("ray")}, versions


def test_the_image_has_a_python_that_the_package_supports() -> None:
    """Its Debian decides, which is named where the image is built and where that is checked."""
    files = (K8S / "image" / "Dockerfile", REPOSITORY / "Makefile")
    (release,) = {found for file in files for found in re.findall(r"debian:(\w+)-slim@", file.read_text())}
    project = (REPOSITORY / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', project)
    assert oldest is not None
    assert PYTHON_OF_DEBIAN[release] >= (int(oldest[1]), int(oldest[2]))


@pytest.mark.parametrize("file", sorted(K8S.rglob("*.yaml")), ids=lambda file: str(file.relative_to(K8S)))
def test_no_source_says_a_key_twice(file: Path) -> None:
    """PyYAML takes the last of two; kubectl refuses the file."""
    list(yaml.load_all(file.read_text(), _StrictLoader))


class _StrictLoader(yaml.SafeLoader):
    """Refuses mappings with a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len({str(key) for key in keys}), f"{node.start_mark}: {keys}"
        return super().construct_mapping(node, deep)
