"""Who reaches whom by the NetworkPolicies: what has to work, and what has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.support.manifests import Object, Pod, build, leaves, name, pods
from tests.support.network import Place, may_reach

OPERATORS = (
    Place({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system"),
    Place({"app.kubernetes.io/component": "kuberay-operator"}, "default"),
)
"""As the Helm chart and as the plain manifests label the operator."""
PROMETHEUS = Place({"app.kubernetes.io/name": "prometheus"}, "monitoring")
CLIENT = Place(namespace="shop", namespace_labels={"unclip/images-client": "true"})
STRANGER = Place({"app.kubernetes.io/name": "kuberay"}, "shop")
DNS = Place({"k8s-app": "kube-dns"}, "kube-system")
INTERNET = Place(namespace=None, address="52.216.1.1")
MINIO = Place({"app": "minio"}, "minio")
REDIS = Place({"app": "redis"}, "redis")
GCS, DASHBOARD, SERVE, METRICS, AGENT, WORKER = 6379, 8265, 8000, 8080, 52365, 10002
PORTS = (GCS, DASHBOARD, SERVE, METRICS, AGENT, WORKER)

JOBS = {"platform": "jobs", "overlays/s3-compatible": "overlays/s3-compatible/jobs", "platform+head-recovery": "jobs"}
"""The platforms with policies of their own, each with its jobs."""


@pytest.fixture(params=JOBS)
def platform(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policies(platform: str) -> list[Object]:
    return policies_of(build(platform))


def clusters(platform: str) -> dict[str, list[Pod]]:
    """The pods of the shared cluster, the server, each RayJob, and the submitters, beside a platform."""
    found: dict[str, list[Pod]] = {}
    for part in [*build(platform), *build(JOBS[platform])]:
        for pod in pods(part):
            found.setdefault("submitter" if pod.role == "submitter" else name(part), []).append(pod)
    return {kind: members for kind, members in found.items() if kind in (*NODES, "submitter")}


def places(found: list[Pod], role: str = "") -> list[Place]:
    return [Place.of(pod) for pod in found if not role or pod.role == role]


NODES = ("RayCluster/unclip", "RayService/images", "RayJob/embed", "RayJob/train-prior")


def test_other_platforms_have_the_same_walls() -> None:
    """So that it is enough to look at some of them."""
    walls = {leaf: (policies_of(build(leaf)), labels_of(build(leaf))) for leaf in leaves()}
    for leaf, (policies, labels) in walls.items():
        folder = leaf.partition("+")[0]
        if folder.endswith("jobs"):
            ours = {owner: found for owner, found in labels.items() if owner in walls["jobs"][1]}
            assert (policies, ours) == walls["jobs"], leaf
        elif leaf not in JOBS and folder != "monitoring":
            assert (policies, labels) == walls["platform"], leaf


def policies_of(objects: Sequence[Object]) -> list[Object]:
    return [found for found in objects if found["kind"] == "NetworkPolicy"]


def labels_of(objects: Sequence[Object]) -> dict[str, Mapping[str, str]]:
    return {pod.owner: pod.labels for found in objects for pod in pods(found)}


def test_nodes_of_a_cluster_reach_each_other(platform: str, policies: list[Object]) -> None:
    for cluster in NODES:
        nodes = places(clusters(platform)[cluster])
        assert all(
            may_reach(policies, source, target, port) for source in nodes for target in nodes for port in PORTS
        ), cluster


def test_nodes_do_not_reach_those_of_another_kind_of_cluster(platform: str, policies: list[Object]) -> None:
    for cluster in ("RayCluster/unclip", "RayService/images", "RayJob/embed"):
        for other in {"RayCluster/unclip", "RayService/images", "RayJob/embed"} - {cluster}:
            assert not any(
                may_reach(policies, source, target, port)
                for source in places(clusters(platform)[cluster])
                for target in places(clusters(platform)[other])
                for port in PORTS
            ), f"{cluster} to {other}"


def test_jobs_are_submitted_at_heads_alone(platform: str, policies: list[Object]) -> None:
    found = clusters(platform)
    for source in [*OPERATORS, *places(found["submitter"])]:
        for cluster in NODES:
            for port in PORTS:
                heads = [may_reach(policies, source, head, port) for head in places(found[cluster], "head")]
                assert heads == [port == DASHBOARD], (cluster, port)
                assert not any(may_reach(policies, source, node, port) for node in places(found[cluster], "worker"))


def test_clients_reach_the_images_api_alone(platform: str, policies: list[Object]) -> None:
    for cluster in NODES:
        for role in ("head", "worker"):
            for node in places(clusters(platform)[cluster], role):
                reached = {port for port in PORTS if may_reach(policies, CLIENT, node, port)}
                served = cluster == "RayService/images" and role == "worker"
                assert reached == ({SERVE} if served else set()), (cluster, role)


def test_prometheus_reads_metrics_alone(platform: str, policies: list[Object]) -> None:
    for cluster in NODES:
        for node in places(clusters(platform)[cluster]):
            reached = {port for port in PORTS if may_reach(policies, PROMETHEUS, node, port)}
            assert reached == {METRICS}, cluster


def test_strangers_reach_nothing(platform: str, policies: list[Object]) -> None:
    nodes = [node for found in clusters(platform).values() for node in places(found)]
    assert not any(may_reach(policies, STRANGER, node, port) for node in nodes for port in PORTS)


def test_pods_reach_names_and_https_outside(platform: str, policies: list[Object]) -> None:
    found = clusters(platform)
    for kind, members in found.items():
        for place in places(members):
            assert may_reach(policies, place, DNS, 53, "UDP"), kind
            assert may_reach(policies, place, INTERNET, 443) == (kind != "submitter"), kind
            assert not may_reach(policies, place, INTERNET, 80), kind
            assert not may_reach(policies, place, INTERNET, 22), kind


def test_heads_alone_reach_the_api_server(platform: str, policies: list[Object]) -> None:
    api_server = Place(namespace=None, address="10.0.0.1")
    for kind in NODES:
        for pod in clusters(platform)[kind]:
            for port in (6443, 8443):
                assert may_reach(policies, Place.of(pod), api_server, port) == (pod.role == "head"), pod.owner


def test_stores_of_ones_own_are_reached_where_the_overlay_has_them(platform: str, policies: list[Object]) -> None:
    for kind in NODES:
        for pod in clusters(platform)[kind]:
            place = Place.of(pod)
            assert may_reach(policies, place, MINIO, 9000) == (platform == "overlays/s3-compatible"), pod.owner
            recovers = platform == "platform+head-recovery" and pod.role == "head"
            assert may_reach(policies, place, REDIS, 6379) == recovers, pod.owner


# That policies are read as Kubernetes reads them.

A, B = Place({"app": "a"}), Place({"app": "b"}, ports={"http": 8000})


def policy(way: str, *rules: Mapping[str, Any], app: str = "b") -> Object:
    spec = {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [way], way.lower(): list(rules)}
    return {"kind": "NetworkPolicy", "spec": spec}


@pytest.mark.parametrize(
    ("policies", "reaches"),
    [
        ([], True),
        ([policy("Ingress")], False),
        ([policy("Ingress", app="c")], True),
        ([policy("Egress", app="a")], False),
        ([policy("Egress")], True),
        ([policy("Ingress"), policy("Ingress", {})], True),
        ([policy("Ingress", {"from": [{"podSelector": {}}]})], True),
        ([policy("Ingress", {"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]})], False),
        ([policy("Ingress", {"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]})], False),
        ([policy("Ingress", {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]})], False),
        ([policy("Ingress", {"ports": [{"port": "http"}]})], True),
        ([policy("Ingress", {"ports": [{"port": 8001}]})], False),
        ([policy("Ingress", {"ports": [{"port": 7000, "endPort": 9000}]})], True),
        ([policy("Ingress", {"ports": [{"port": 8000, "protocol": "UDP"}]})], False),
        (
            [policy("Ingress", {"ports": [{"port": 8000}], "from": [{"podSelector": {"matchLabels": {"app": "c"}}}]})],
            False,
        ),
    ],
)
def test_policies_are_read(policies: list[Object], reaches: bool) -> None:
    assert may_reach(policies, A, B, 8000) == reaches


def test_addresses_outside_are_read() -> None:
    block = {"cidr": "52.0.0.0/8", "except": ["52.216.0.0/16"]}
    policies = [policy("Egress", {"to": [{"ipBlock": block}]}, app="a")]
    assert may_reach(policies, A, Place(namespace=None, address="52.1.1.1"), 443)
    assert not may_reach(policies, A, INTERNET, 443)
    assert not may_reach(policies, A, Place(namespace=None, address="10.0.0.1"), 443)
