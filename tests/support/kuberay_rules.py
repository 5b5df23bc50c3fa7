"""What KubeRay 1.7's operator refuses beyond its schemas, in its default configuration (feature gates as released).

An object that breaks a rule is accepted by `kubectl apply`, and then never becomes a cluster: the operator only writes an event.
Rules about fields behind a gate that is off come down to one: the field may not be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import yaml
from tests.support.manifests import Object

Spec = Mapping[str, Any]

MAX_CLUSTER_NAME = 53
"""`-serve-svc` is appended to it, and names of services have 63 characters."""
MAX_OWNER_NAME = MAX_CLUSTER_NAME - 6
"""Of RayJobs and RayServices, whose clusters' names have six characters more."""
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Fields of a RayClusterSpec behind gates that are off, with the gates."""
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DURATION = re.compile(r"\+?([0-9]*\.?[0-9]+(ns|us|µs|ms|s|m|h))+")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def problems(found: Object) -> list[str]:
    """Of a RayCluster, RayJob or RayService; other objects have none."""
    check = {"RayCluster": _ray_cluster, "RayJob": _ray_job, "RayService": _ray_service}.get(found["kind"])
    return list(check(found)) if check else []


def is_label(key: str, value: str) -> bool:
    """Whether Kubernetes takes them as a label."""
    prefix, _, last = key.rpartition("/")
    good_prefix = not prefix or (len(prefix) <= 253 and _DNS_SUBDOMAIN.fullmatch(prefix))
    return bool(good_prefix and _LABEL_NAME.fullmatch(last) and (not value or _LABEL_NAME.fullmatch(value)))


def _ray_cluster(found: Object) -> Iterator[str]:
    yield from _name(found, MAX_CLUSTER_NAME)
    strategy = found["spec"].get("upgradeStrategy", {}).get("type")
    if strategy not in (None, "Recreate", "None"):
        yield f"upgradeStrategy.type {strategy} is neither Recreate nor None"
    yield from _cluster_spec(found["spec"], _annotations(found))


def _ray_service(found: Object) -> Iterator[str]:
    yield from _name(found, MAX_OWNER_NAME)
    yield from _initializing_timeout(_annotations(found).get("ray.io/initializing-timeout", ""))
    spec, cluster = found["spec"], found["spec"]["rayClusterConfig"]
    yield from _owned_cluster("RayService", cluster, _annotations(found))
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService.metadata.name is set"
    strategy = spec.get("upgradeStrategy", {})
    kinds = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    if strategy.get("type", "NewCluster") not in kinds:
        yield f"upgradeStrategy.type {strategy['type']} is none of {', '.join(kinds)}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_upgrade(cluster, strategy.get("clusterUpgradeOptions"))


def _initializing_timeout(text: str) -> Iterator[str]:
    numbers = [float(number) for number in re.findall(r"[0-9]*\.?[0-9]+", text)]
    readable = _DURATION.fullmatch(text) or re.fullmatch(r"\+?[0-9]+", text)
    if text and not (readable and any(numbers)):
        yield f"ray.io/initializing-timeout {text!r} is no positive duration"


def _incremental_upgrade(cluster: Spec, options: Spec | None) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling"):
        yield "NewClusterWithIncrementalUpgrade needs the autoscaler"
    if options is None:
        yield "NewClusterWithIncrementalUpgrade needs clusterUpgradeOptions"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= surge <= 100:
        yield "maxSurgePercent is not between 0 and 100"
    if not 0 <= step <= 100:
        yield "stepSizePercent is not between 0 and 100"
    if step > surge:
        yield "stepSizePercent is more than maxSurgePercent"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds is not positive"
    if not options.get("gatewayClassName"):
        yield "gatewayClassName is missing"


def _ray_job(found: Object) -> Iterator[str]:
    yield from _name(found, MAX_OWNER_NAME)
    spec = found["spec"]
    cluster, selector, mode = spec.get("rayClusterSpec"), spec.get("clusterSelector"), spec.get("submissionMode")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend does not go with clusterSelector"
    if cluster is None and not selector:
        yield "neither rayClusterSpec nor clusterSelector is set"
    yield from _deletion(spec)
    if selector:
        yield from _selected_cluster(spec)
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with InteractiveMode"
    if mode == "SidecarMode":
        yield from _sidecar(spec)
    if cluster is not None:
        yield from _owned_cluster("RayJob", cluster, _annotations(found))
    yield from _numbers_of_job(spec)
    yield from _runtime_env(spec.get("runtimeEnvYAML", ""))


def _selected_cluster(spec: Spec) -> Iterator[str]:
    if not spec["clusterSelector"].get("ray.io/cluster"):
        yield "clusterSelector has no ray.io/cluster"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector does not go with SidecarMode"
    if spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with clusterSelector"


def _sidecar(spec: Spec) -> Iterator[str]:
    for field in ("submitterPodTemplate", "submitterConfig"):
        if field in spec:
            yield f"{field} does not go with SidecarMode"
    if cluster := spec.get("rayClusterSpec"):
        yield from _never_restarted("head", cluster["headGroupSpec"], "SidecarMode")


def _numbers_of_job(spec: Spec) -> Iterator[str]:
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} is not positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"


def _runtime_env(text: str) -> Iterator[str]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is no YAML: {error}"
        return
    if not isinstance(content, dict | None):
        yield "runtimeEnvYAML is no mapping"


def _deletion(spec: Spec) -> Iterator[str]:
    shutdown, strategy = spec.get("shutdownAfterJobFinishes"), spec.get("deletionStrategy")
    if not shutdown and spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if strategy is None:
        return
    rules, legacy = strategy.get("deletionRules"), {"onSuccess", "onFailure"} & set(strategy)
    if rules and shutdown:
        yield "deletionRules do not go with shutdownAfterJobFinishes"
    if rules and legacy:
        yield "deletionRules do not go with onSuccess and onFailure"
    elif legacy:
        yield from _legacy_deletion(spec, strategy)
    elif rules:
        yield from _deletion_rules(spec, rules)
    else:
        yield "deletionStrategy has neither deletionRules nor onSuccess and onFailure"


def _legacy_deletion(spec: Spec, strategy: Spec) -> Iterator[str]:
    policies = [strategy.get(when, {}).get("policy") for when in ("onSuccess", "onFailure")]
    if None in policies:
        yield "onSuccess and onFailure both need a policy"
    for policy in policies:
        yield from _impossible_deletion(spec, policy)
    if spec.get("shutdownAfterJobFinishes") and "DeleteNone" in policies:
        yield "DeleteNone does not go with shutdownAfterJobFinishes"


def _impossible_deletion(spec: Spec, policy: str | None) -> Iterator[str]:
    if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
        yield f"{policy} does not go with clusterSelector"
    if policy == "DeleteWorkers" and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
        yield "DeleteWorkers does not go with the autoscaler"


def _deletion_rules(spec: Spec, rules: list[Spec]) -> Iterator[str]:
    ttls: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        place, condition, policy = f"deletionRules[{index}]", rule["condition"], rule["policy"]
        status = [(kind, condition[kind]) for kind in ("jobStatus", "jobDeploymentStatus") if kind in condition]
        if len(status) != 1:
            yield f"{place}: exactly one of jobStatus and jobDeploymentStatus has to be set"
            continue
        if condition.get("ttlSeconds", 0) < 0:
            yield f"{place}: ttlSeconds is negative"
        for problem in _impossible_deletion(spec, policy):
            yield f"{place}: {problem}"
        of_status = ttls.setdefault(status[0], {})
        if policy in of_status:
            yield f"{place}: a second rule for {policy} at {status[0][1]}"
        of_status.setdefault(policy, condition.get("ttlSeconds", 0))
    for (_, status_name), of_status in ttls.items():
        ordered = [(of_status[policy], policy) for policy in DELETION_ORDER if policy in of_status]
        for (sooner, first), (later, second) in pairwise(ordered):
            if later < sooner:
                yield f"at {status_name}, {second} ({later} s) comes before {first} ({sooner} s)"


def _owned_cluster(owner: str, cluster: Spec, annotations: Mapping[str, str]) -> Iterator[str]:
    """A cluster inside of a RayJob or RayService."""
    if cluster.get("upgradeStrategy", {}).get("type"):
        yield f"the cluster of a {owner} has an upgradeStrategy"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield f"enableK8sTokenAuth does not go with a {owner}"
    yield from _cluster_spec(cluster, annotations)


def _cluster_spec(spec: Spec, annotations: Mapping[str, str]) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    empty = [place for place, group in _groups(spec) if not group["template"]["spec"].get("containers")]
    if empty:
        yield from (f"{place}: has no container" for place in empty)
        return
    for place, group in _groups(spec):
        yield from (f"{place}: {problem}" for problem in _group(group))
    for group in workers:
        yield from (f"{group['groupName']}: {problem}" for problem in _worker_group(group, spec))
    yield from _autoscaler(spec)
    yield from _fault_tolerance(spec, head, annotations)
    yield from _token_auth(spec)
    for field, gate in GATED.items():
        if field in spec:
            yield f"{field} needs the feature gate {gate}, which is off"


def _group(group: Spec) -> Iterator[str]:
    params, labels = group.get("rayStartParams") or {}, group.get("labels", {})
    if group.get("resources") and any(params.get(key) for key in _RESOURCE_PARAMS):
        yield "resources are set both in rayStartParams and in resources"
    if "labels" in params:
        yield "rayStartParams.labels: use labels of the group"
    for key, value in labels.items():
        if not is_label(key, value):
            yield f"{key}: {value} is no label of Kubernetes"


def _worker_group(group: Spec, spec: Spec) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not spec.get("enableInTreeAutoscaling") and None in (least, most):
        yield "minReplicas and maxReplicas both have to be set without the autoscaler"
    if (least or 0) < 0 or (most or 0) < 0:
        yield "minReplicas or maxReplicas is negative"
    if least is not None and most is not None and least > most:
        yield f"minReplicas {least} is more than maxReplicas {most}"
    if group.get("idleTimeoutSeconds", 0) < 0:
        yield "idleTimeoutSeconds is negative"
    if "idleTimeoutSeconds" in group and not _is_autoscaler_v2(spec):
        yield "idleTimeoutSeconds needs the autoscaler v2"
    if group.get("priority"):
        yield from _needs_version(spec, (2, 56), "priority")
        if not _is_autoscaler_v2(spec):
            yield "priority needs the autoscaler v2"
    if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
        yield "suspend does not go with the autoscaler"


def _autoscaler(spec: Spec) -> Iterator[str]:
    options, head_env = spec.get("autoscalerOptions", {}), _env(spec["headGroupSpec"])
    if not spec.get("enableInTreeAutoscaling"):
        if head_env.get(AUTOSCALER_V2) in ("1", "true"):
            yield f"{AUTOSCALER_V2} is set without enableInTreeAutoscaling"
    else:
        if "version" in options and AUTOSCALER_V2 in head_env:
            yield f"autoscalerOptions.version and {AUTOSCALER_V2} are both set"
        if options.get("version") == "v2":
            for place, group in _groups(spec):
                yield from _never_restarted(place, group, "the autoscaler v2")
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(entry["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for entry in options.get("env", [])):
        yield "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is KubeRay's"


def _never_restarted(place: str, group: Spec, why: str) -> Iterator[str]:
    policy = group["template"]["spec"].get("restartPolicy")
    if policy not in (None, "Never"):
        yield f"{place}: restartPolicy {policy} does not go with {why}"


def _fault_tolerance(spec: Spec, head: Spec, annotations: Mapping[str, str]) -> Iterator[str]:
    options, env, params = spec.get("gcsFaultToleranceOptions"), _env(head), head.get("rayStartParams") or {}
    annotated = annotations.get("ray.io/ft-enabled", "")
    if annotated and options is not None:
        yield "gcsFaultToleranceOptions and the annotation ray.io/ft-enabled are both set"
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "the user of Redis belongs in gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if annotated.lower() != "true" and "RAY_REDIS_ADDRESS" in env:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    if params.get("redis-password") or "REDIS_PASSWORD" in env:
        yield "the password of Redis belongs in gcsFaultToleranceOptions.redisPassword"
    if "RAY_REDIS_ADDRESS" in env:
        yield "the address of Redis belongs in gcsFaultToleranceOptions.redisAddress"
    if annotations.get("ray.io/external-storage-namespace"):
        yield "the namespace belongs in gcsFaultToleranceOptions.externalStorageNamespace"
    if options.get("backend", "redis") == "rocksdb":
        yield "backend rocksdb needs the feature gate GCSFaultToleranceEmbeddedStorage, which is off"
    elif "storage" in options:
        yield "gcsFaultToleranceOptions.storage is for the backend rocksdb alone"


def _token_auth(spec: Spec) -> Iterator[str]:
    options = spec.get("authOptions", {})
    by_kubernetes = options.get("enableK8sTokenAuth")
    if options.get("mode") != "token":
        if by_kubernetes:
            yield "enableK8sTokenAuth needs authOptions.mode token"
        return
    yield from _needs_version(spec, (2, 52), "authOptions.mode token")
    if by_kubernetes:
        yield from _needs_version(spec, (2, 55), "enableK8sTokenAuth")
        if options.get("secretName"):
            yield "authOptions.secretName does not go with enableK8sTokenAuth"


def _needs_version(spec: Spec, least: tuple[int, int], what: str) -> Iterator[str]:
    given = spec.get("rayVersion", "")
    parts = re.match(r"v?(\d+)\.(\d+)", given)
    if parts is None or (int(parts[1]), int(parts[2])) < least:
        yield f"{what} needs rayVersion {least[0]}.{least[1]} or later, which is {given or 'not set'}"


def _name(found: Object, longest: int) -> Iterator[str]:
    name = found["metadata"]["name"]
    if len(name) > longest:
        yield f"the name has more than {longest} characters"
    if not _DNS_1035.fullmatch(name):
        yield f"the name {name} has others than a-z, 0-9 and -, or begins or ends with a wrong one"


def _groups(spec: Spec) -> list[tuple[str, Spec]]:
    workers = spec.get("workerGroupSpecs", [])
    return [("head", spec["headGroupSpec"]), *((group["groupName"], group) for group in workers)]


def _is_autoscaler_v2(spec: Spec) -> bool:
    asked = _env(spec["headGroupSpec"]).get(AUTOSCALER_V2) in ("1", "true")
    return spec.get("autoscalerOptions", {}).get("version") == "v2" or asked


def _env(group: Spec) -> dict[str, str | None]:
    """The environment of the group's Ray container; None where a value comes from elsewhere."""
    container = group["template"]["spec"]["containers"][0]
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def _annotations(found: Object) -> Mapping[str, str]:
    return found["metadata"].get("annotations") or {}
