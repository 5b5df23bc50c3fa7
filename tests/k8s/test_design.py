"""What the platform is meant to be: clusters that start from nothing, that need a token, and that end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

import pytest
from tests.support.manifests import Object, Pod, build, cluster_spec, name, pods, quantity

GPU = "nvidia.com/gpu"


def is_queued(found: Object) -> bool:
    return "kueue.x-k8s.io/queue-name" in found["metadata"].get("labels", {})


def test_clusters_start_from_nothing(objects: tuple[Object, ...]) -> None:
    for found in objects:
        spec = cluster_spec(found)
        if spec is None or is_queued(found):
            continue
        assert spec["enableInTreeAutoscaling"] is True, name(found)
        assert spec["autoscalerOptions"]["version"] == "v2", name(found)
        for group in spec["workerGroupSpecs"]:
            sizes = (group["replicas"], group["minReplicas"])
            assert sizes == (0, 0), f"{name(found)} {group['groupName']}"


def test_queued_clusters_have_all_their_nodes(objects: tuple[Object, ...]) -> None:
    """Kueue admits none that scales itself, and counts what stands in the group."""
    for found in objects:
        if is_queued(found):
            spec = cluster_spec(found)
            assert found["spec"]["suspend"] is True, name(found)
            assert spec is not None
            assert spec["enableInTreeAutoscaling"] is False, name(found)
            for group in spec["workerGroupSpecs"]:
                sizes = {group["replicas"], group["minReplicas"], group["maxReplicas"]}
                assert len(sizes) == 1, f"{name(found)} {group['groupName']}"
                assert sizes != {0}, f"{name(found)} {group['groupName']}"


def test_every_rayjob_of_the_queues_overlay_is_queued(leaf: str, objects: tuple[Object, ...]) -> None:
    jobs = [found for found in objects if found["kind"] == "RayJob"]
    assert [is_queued(job) for job in jobs] == [leaf == "overlays/kueue/jobs"] * len(jobs)


def test_every_cluster_needs_a_token(objects: tuple[Object, ...]) -> None:
    specs = {name(found): spec for found in objects if (spec := cluster_spec(found)) is not None}
    assert {key: spec.get("authOptions") for key, spec in specs.items()} == {key: {"mode": "token"} for key in specs}


def test_heads_run_no_tasks(objects: tuple[Object, ...]) -> None:
    for pod in (pod for found in objects for pod in pods(found)):
        if pod.role == "head":
            params = pod.group["rayStartParams"]
            assert (params["num-cpus"], params["num-gpus"]) == ("0", "0"), pod.owner
            assert GPU not in pod.main["resources"]["limits"], pod.owner


def test_gpus_are_where_gpus_work(leaf: str, objects: tuple[Object, ...]) -> None:
    """In whole numbers, with a toleration of what GPU nodes are tainted with; none on a laptop."""
    for pod in (pod for found in objects for pod in pods(found)):
        gpus = quantity(pod.main["resources"]["limits"].get(GPU, 0))
        wanted = pod.labels.get("ray.io/group") in ("train", "serve") and not leaf.startswith("overlays/cpu-local")
        assert (gpus > 0) == wanted, pod.owner
        assert gpus % 1 == 0, pod.owner
        if gpus:
            assert [t for t in pod.spec["tolerations"] if t["key"] == GPU and t["operator"] == "Exists"], pod.owner


@pytest.mark.parametrize(("overlay", "cpus", "memory"), [("cpu-local", 4, "8Gi"), ("gpu-single", 16, "64Gi")])
def test_one_machine_holds_what_it_is_said_to_hold(overlay: str, cpus: int, memory: str) -> None:
    """A RayJob or the server beside heads that are awake, with a CPU and a GiB left for Kubernetes and the operator."""
    clusters = [found for found in build(f"overlays/{overlay}") if cluster_spec(found) is not None]
    awake = [found for found in clusters if not found["spec"].get("suspend")]
    (server,) = [found for found in clusters if found["kind"] == "RayService"]
    for found in [*build(f"overlays/{overlay}/jobs"), server]:
        heads = [pod for other in awake if other is not found for pod in pods(other) if pod.role == "head"]
        asked = requests([*heads, *pods(found)])
        assert asked["cpu"] <= cpus - 1, name(found)
        assert asked["memory"] <= quantity(memory) - quantity("1Gi"), name(found)


def requests(found: Iterable[Pod]) -> dict[str, Decimal]:
    """Of all containers, of as many pods as their group may have."""
    total: dict[str, Decimal] = defaultdict(Decimal)
    for pod in found:
        for container in pod.containers:
            for resource, asked in container["resources"]["requests"].items():
                total[resource] += quantity(asked) * pod.group.get("maxReplicas", 1)
    return total


def test_rayjobs_end_with_their_clusters(objects: tuple[Object, ...]) -> None:
    for found in objects:
        if found["kind"] == "RayJob":
            spec = found["spec"]
            assert spec.get("shutdownAfterJobFinishes") or spec.get("deletionStrategy"), name(found)
            assert spec["submissionMode"] == "K8sJobMode", name(found)
            attempts = (0, 0) if found["metadata"]["name"] == "preflight" else (1, 5)
            assert attempts[0] <= spec["backoffLimit"] <= attempts[1], f"{name(found)}: each attempt is a new cluster"


def test_disruption_budgets_keep_heads_and_servers(everything: dict[str, tuple[Object, ...]]) -> None:
    for leaf, objects in everything.items():
        if any(found["kind"] == "RayService" for found in objects):
            budgets = [found for found in objects if found["kind"] == "PodDisruptionBudget"]
            text = [str(budget["spec"]["selector"]) for budget in budgets]
            assert any("ray.io/cluster" in selector and "head" in selector for selector in text), leaf
            assert any("ray.io/serve" in selector and "worker" in selector for selector in text), leaf
