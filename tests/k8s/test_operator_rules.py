"""The rules that KubeRay's operator has beyond its schemas: our objects keep them, and each of them bites."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.support.kuberay_rules import problems
from tests.support.manifests import Object, name

TEMPLATE = {"spec": {"containers": [{"name": "ray", "image": "unclip"}]}}
CLUSTER = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2"},
    "authOptions": {"mode": "token"},
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": TEMPLATE},
    "workerGroupSpecs": [{"groupName": "train", "minReplicas": 0, "maxReplicas": 8, "template": TEMPLATE}],
}
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": {"entrypoint": "python jobs/embed.py", "shutdownAfterJobFinishes": True, "rayClusterSpec": CLUSTER},
    "RayService": {"serveConfigV2": "", "rayClusterConfig": CLUSTER},
}
"""Of a good object of each kind."""
PREFIX = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}
HEAD = "headGroupSpec.template.spec"
TRAIN = "workerGroupSpecs.0"


def changed(kind: str, changes: dict[str, Any]) -> Object:
    """The good object after `changes`, by dotted path; a value of None takes the field away."""
    found: Any = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "unclip"}, "spec": SPECS[kind]}
    found = copy.deepcopy(found)
    for path, value in changes.items():
        place, keys = found, path.replace("CLUSTER", PREFIX[kind]).split(".")
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if value is None:
            place.pop(keys[-1], None)
        else:
            place[keys[-1]] = value
    return found


def env(key: str, value: str = "x") -> list[dict[str, str]]:
    return [{"name": key, "value": value}]


def rule(policy: str, ttl: int = 0, **status: Any) -> dict[str, Any]:
    return {"policy": policy, "condition": {"ttlSeconds": ttl, **status}}


OF_CLUSTERS: list[tuple[dict[str, Any], str]] = [
    ({f"CLUSTER.{HEAD}.containers": []}, "head: has no container"),
    ({f"CLUSTER.{TRAIN}.template.spec.containers": []}, "train: has no container"),
    ({"CLUSTER.headGroupSpec.resources": {"CPU": "0"}}, "head: resources are set both"),
    (
        {f"CLUSTER.{TRAIN}.rayStartParams": {"num-gpus": "8"}, f"CLUSTER.{TRAIN}.resources": {"CPU": "1"}},
        "train: resources are set both",
    ),
    ({f"CLUSTER.{TRAIN}.rayStartParams": {"labels": "a=b"}}, "train: rayStartParams.labels"),
    ({f"CLUSTER.{TRAIN}.labels": {"unclip/": "train"}}, "is no label"),
    ({f"CLUSTER.{TRAIN}.labels": {"un clip/group": "train"}}, "is no label"),
    ({f"CLUSTER.{TRAIN}.labels": {"unclip/group": "-train"}}, "is no label"),
    ({f"CLUSTER.{TRAIN}.labels": {"unclip/group": "t" * 64}}, "is no label"),
    ({f"CLUSTER.{TRAIN}.minReplicas": -1}, "is negative"),
    ({f"CLUSTER.{TRAIN}.minReplicas": 9}, "minReplicas 9 is more than maxReplicas 8"),
    (
        {f"CLUSTER.{TRAIN}.maxReplicas": None, "CLUSTER.enableInTreeAutoscaling": False},
        "train: minReplicas and maxReplicas both have to be set",
    ),
    ({f"CLUSTER.{TRAIN}.idleTimeoutSeconds": -1}, "train: idleTimeoutSeconds is negative"),
    (
        {f"CLUSTER.{TRAIN}.idleTimeoutSeconds": 60, "CLUSTER.autoscalerOptions.version": "v1"},
        "idleTimeoutSeconds needs the autoscaler v2",
    ),
    ({f"CLUSTER.{TRAIN}.priority": 1, "CLUSTER.rayVersion": "2.55.1"}, "priority needs rayVersion 2.56"),
    ({f"CLUSTER.{TRAIN}.priority": 1, "CLUSTER.autoscalerOptions": None}, "priority needs the autoscaler v2"),
    ({f"CLUSTER.{TRAIN}.suspend": True}, "suspend does not go with the autoscaler"),
    (
        {
            "CLUSTER.enableInTreeAutoscaling": None,
            f"CLUSTER.{HEAD}.containers.0.env": env("RAY_enable_autoscaler_v2", "1"),
        },
        "without enableInTreeAutoscaling",
    ),
    ({f"CLUSTER.{HEAD}.containers.0.env": env("RAY_enable_autoscaler_v2", "1")}, "are both set"),
    ({f"CLUSTER.{HEAD}.restartPolicy": "Always"}, "head: restartPolicy Always"),
    ({f"CLUSTER.{TRAIN}.template.spec.restartPolicy": "OnFailure"}, "train: restartPolicy OnFailure"),
    ({"CLUSTER.autoscalerOptions.idleTimeoutSeconds": -1}, "autoscalerOptions.idleTimeoutSeconds is negative"),
    ({"CLUSTER.autoscalerOptions.env": env("KUBERAY_GEN_AUTOSCALER_START_CMD")}, "which is KubeRay's"),
    ({f"CLUSTER.{HEAD}.containers.0.env": env("RAY_REDIS_ADDRESS")}, "without gcsFaultToleranceOptions"),
    (
        {"CLUSTER.gcsFaultToleranceOptions": {}, f"CLUSTER.{HEAD}.containers.0.env": env("RAY_REDIS_ADDRESS")},
        "the address of Redis belongs",
    ),
    (
        {"CLUSTER.gcsFaultToleranceOptions": {}, f"CLUSTER.{HEAD}.containers.0.env": env("REDIS_PASSWORD")},
        "the password of Redis belongs",
    ),
    (
        {"CLUSTER.gcsFaultToleranceOptions": {}, "CLUSTER.headGroupSpec.rayStartParams.redis-password": "x"},
        "the password of Redis belongs",
    ),
    ({"CLUSTER.headGroupSpec.rayStartParams.redis-username": "x"}, "the user of Redis belongs"),
    ({f"CLUSTER.{HEAD}.containers.0.env": env("REDIS_USERNAME")}, "the user of Redis belongs"),
    (
        {"CLUSTER.gcsFaultToleranceOptions": {}, "metadata.annotations": {"ray.io/ft-enabled": "true"}},
        "are both set",
    ),
    (
        {"CLUSTER.gcsFaultToleranceOptions": {}, "metadata.annotations": {"ray.io/external-storage-namespace": "a"}},
        "the namespace belongs",
    ),
    ({"CLUSTER.gcsFaultToleranceOptions": {"backend": "rocksdb"}}, "GCSFaultToleranceEmbeddedStorage"),
    ({"CLUSTER.gcsFaultToleranceOptions": {"storage": {}}}, "for the backend rocksdb alone"),
    ({"CLUSTER.rayVersion": None}, "authOptions.mode token needs rayVersion 2.52"),
    ({"CLUSTER.rayVersion": "2.51.2"}, "authOptions.mode token needs rayVersion 2.52"),
    ({"CLUSTER.networkPolicy": {}}, "the feature gate RayClusterNetworkPolicy"),
    ({"CLUSTER.tlsOptions": {}}, "the feature gate RayClusterMTLS"),
    ({"CLUSTER.historyServerOptions": {}}, "the feature gate RayClusterHistoryServer"),
    ({"metadata.name": "Unclip"}, "the name Unclip has others"),
    ({"metadata.name": "1-unclip"}, "the name 1-unclip has others"),
    ({"metadata.name": "u" * 54}, "the name has more than"),
]
OF_KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("RayCluster", {"spec.upgradeStrategy": {"type": "NewCluster"}}, "neither Recreate nor None"),
    ("RayCluster", {"spec.authOptions": {"enableK8sTokenAuth": True}}, "enableK8sTokenAuth needs authOptions.mode"),
    (
        "RayCluster",
        {"spec.authOptions.enableK8sTokenAuth": True, "spec.rayVersion": "2.54.0"},
        "enableK8sTokenAuth needs rayVersion 2.55",
    ),
    (
        "RayCluster",
        {"spec.authOptions": {"mode": "token", "enableK8sTokenAuth": True, "secretName": "token"}},
        "secretName does not go with enableK8sTokenAuth",
    ),
    ("RayService", {"metadata.name": "u" * 48}, "more than 47"),
    ("RayService", {"metadata.annotations": {"ray.io/initializing-timeout": "soon"}}, "is no positive duration"),
    ("RayService", {"metadata.annotations": {"ray.io/initializing-timeout": "0s"}}, "is no positive duration"),
    ("RayService", {"CLUSTER.upgradeStrategy": {"type": "Recreate"}}, "the cluster of a RayService"),
    ("RayService", {"CLUSTER.authOptions.enableK8sTokenAuth": True}, "does not go with a RayService"),
    ("RayService", {"CLUSTER.headGroupSpec.headService": {"metadata": {"name": "head"}}}, "headService.metadata.name"),
    ("RayService", {"spec.upgradeStrategy": {"type": "Recreate"}}, "upgradeStrategy.type Recreate is none of"),
    ("RayService", {"spec.rayClusterDeletionDelaySeconds": -1}, "rayClusterDeletionDelaySeconds is negative"),
    (
        "RayService",
        {"spec.upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade"}},
        "needs clusterUpgradeOptions",
    ),
    ("RayJob", {"metadata.name": "u" * 48}, "more than 47"),
    ("RayJob", {"CLUSTER.upgradeStrategy": {"type": "Recreate"}}, "the cluster of a RayJob"),
    ("RayJob", {"CLUSTER.authOptions.enableK8sTokenAuth": True}, "does not go with a RayJob"),
    ("RayJob", {"spec.suspend": True, "spec.shutdownAfterJobFinishes": None}, "suspend needs shutdownAfterJobFinishes"),
    ("RayJob", {"spec.suspend": True, "spec.clusterSelector": {"ray.io/cluster": "a"}}, "suspend does not go with"),
    ("RayJob", {"spec.rayClusterSpec": None}, "neither rayClusterSpec nor clusterSelector"),
    ("RayJob", {"spec.clusterSelector": {"cluster": "a"}}, "clusterSelector has no ray.io/cluster"),
    (
        "RayJob",
        {"spec.clusterSelector": {"ray.io/cluster": "a"}, "spec.submissionMode": "SidecarMode"},
        "clusterSelector does not go with SidecarMode",
    ),
    (
        "RayJob",
        {"spec.clusterSelector": {"ray.io/cluster": "a"}, "spec.backoffLimit": 1},
        "backoffLimit does not go with clusterSelector",
    ),
    (
        "RayJob",
        {"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 1},
        "backoffLimit does not go with InteractiveMode",
    ),
    (
        "RayJob",
        {"spec.submissionMode": "SidecarMode", "spec.submitterPodTemplate": TEMPLATE},
        "submitterPodTemplate does not go with SidecarMode",
    ),
    (
        "RayJob",
        {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}},
        "submitterConfig does not go with SidecarMode",
    ),
    (
        "RayJob",
        {
            "spec.submissionMode": "SidecarMode",
            f"CLUSTER.{HEAD}.restartPolicy": "Always",
            "CLUSTER.enableInTreeAutoscaling": False,
        },
        "does not go with SidecarMode",
    ),
    ("RayJob", {"spec.activeDeadlineSeconds": 0}, "activeDeadlineSeconds is not positive"),
    ("RayJob", {"spec.preRunningDeadlineSeconds": 0}, "preRunningDeadlineSeconds is not positive"),
    ("RayJob", {"spec.backoffLimit": -1}, "backoffLimit is negative"),
    ("RayJob", {"spec.ttlSecondsAfterFinished": -1}, "ttlSecondsAfterFinished is negative"),
    ("RayJob", {"spec.runtimeEnvYAML": "a: ["}, "runtimeEnvYAML is no YAML"),
    ("RayJob", {"spec.runtimeEnvYAML": "working_dir"}, "runtimeEnvYAML is no mapping"),
    (
        "RayJob",
        {"spec.shutdownAfterJobFinishes": None, "spec.ttlSecondsAfterFinished": 60},
        "ttlSecondsAfterFinished needs",
    ),
]
SUCCEEDED: dict[str, Any] = {"jobStatus": "SUCCEEDED"}
FAILED: dict[str, Any] = {"jobStatus": "FAILED"}
OF_DELETION: list[tuple[dict[str, Any], str]] = [
    ({}, "has neither deletionRules nor"),
    ({"onSuccess": {"policy": "DeleteSelf"}}, "both need a policy"),
    ({"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {}}, "both need a policy"),
    ({"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteSelf"}}, "with the autoscaler"),
    ({"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": [rule("DeleteSelf", **FAILED)]}, "do not go with onS"),
    ({"deletionRules": [rule("DeleteSelf")]}, "exactly one of"),
    ({"deletionRules": [rule("DeleteSelf", jobStatus="FAILED", jobDeploymentStatus="Failed")]}, "exactly one of"),
    ({"deletionRules": [rule("DeleteSelf", -1, **FAILED)]}, "ttlSeconds is negative"),
    ({"deletionRules": [rule("DeleteWorkers", **FAILED)]}, "DeleteWorkers does not go with the autoscaler"),
    ({"deletionRules": [rule("DeleteSelf", **FAILED)] * 2}, "a second rule for DeleteSelf at FAILED"),
    (
        {"deletionRules": [rule("DeleteCluster", 600, **SUCCEEDED), rule("DeleteSelf", 60, **SUCCEEDED)]},
        "DeleteSelf (60 s) comes before DeleteCluster (600 s)",
    ),
]
UPGRADE = {"maxSurgePercent": 100, "stepSizePercent": 20, "intervalSeconds": 10, "gatewayClassName": "istio"}
OF_UPGRADES: list[tuple[dict[str, Any], str]] = [
    ({"maxSurgePercent": 101}, "maxSurgePercent is not between"),
    ({"stepSizePercent": -1}, "stepSizePercent is not between"),
    ({"maxSurgePercent": 10}, "stepSizePercent is more than maxSurgePercent"),
    ({"intervalSeconds": 0}, "intervalSeconds is not positive"),
    ({"gatewayClassName": ""}, "gatewayClassName is missing"),
]


def test_our_objects_keep_the_rules(objects: tuple[Object, ...]) -> None:
    found = {name(found): problems(found) for found in objects}
    assert {key: said for key, said in found.items() if said} == {}


@pytest.mark.parametrize("kind", SPECS)
def test_a_good_object_breaks_no_rule(kind: str) -> None:
    assert problems(changed(kind, {})) == []


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("changes", "said"), OF_CLUSTERS)
def test_rules_of_clusters_bite_in_every_kind(kind: str, changes: dict[str, Any], said: str) -> None:
    assert [problem for problem in problems(changed(kind, changes)) if said in problem]


@pytest.mark.parametrize(("kind", "changes", "said"), OF_KINDS)
def test_rules_of_each_kind_bite(kind: str, changes: dict[str, Any], said: str) -> None:
    assert [problem for problem in problems(changed(kind, changes)) if said in problem]


@pytest.mark.parametrize(("strategy", "said"), OF_DELETION)
def test_rules_of_deletion_bite(strategy: dict[str, Any], said: str) -> None:
    job = changed("RayJob", {"spec.shutdownAfterJobFinishes": None, "spec.deletionStrategy": strategy})
    assert [problem for problem in problems(job) if said in problem]


def test_deletion_rules_do_not_go_with_other_ways_to_end() -> None:
    strategy = {"deletionRules": [rule("DeleteCluster", 600, **FAILED), rule("DeleteSelf", 3600, **FAILED)]}
    alone = {"spec.shutdownAfterJobFinishes": None, "spec.deletionStrategy": strategy}
    assert problems(changed("RayJob", alone)) == []
    assert problems(changed("RayJob", {"spec.deletionStrategy": strategy})) == [
        "deletionRules do not go with shutdownAfterJobFinishes"
    ]
    selected = {"spec.clusterSelector": {"ray.io/cluster": "unclip"}, "spec.rayClusterSpec": None}
    assert problems(changed("RayJob", alone | selected)) == [
        "deletionRules[0]: DeleteCluster does not go with clusterSelector"
    ]
    kept = {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}}
    assert problems(changed("RayJob", {"spec.deletionStrategy": kept})) == [
        "DeleteNone does not go with shutdownAfterJobFinishes"
    ]


@pytest.mark.parametrize(("options", "said"), OF_UPGRADES)
def test_rules_of_incremental_upgrades_bite(options: dict[str, Any], said: str) -> None:
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": UPGRADE}
    assert problems(changed("RayService", {"spec.upgradeStrategy": strategy})) == []
    broken = {**strategy, "clusterUpgradeOptions": {**UPGRADE, **options}}
    assert [said in problem for problem in problems(changed("RayService", {"spec.upgradeStrategy": broken}))] == [True]


def test_an_incremental_upgrade_needs_the_autoscaler() -> None:
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": UPGRADE}
    changes = {"spec.upgradeStrategy": strategy, "CLUSTER.enableInTreeAutoscaling": False}
    assert problems(changed("RayService", changes)) == ["NewClusterWithIncrementalUpgrade needs the autoscaler"]
