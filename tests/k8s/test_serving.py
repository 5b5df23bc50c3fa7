"""The images API: its Serve configuration, and that its pods and its drain have room for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from tests.support.manifests import Object, Pod, build, leaves, pods, quantity
from tests.support.network import Place

from unclip.cluster.serve.application import DRAIN_S, INGRESS, read_args
from unclip.cluster.serve.replicas import UserConfig, group_name
from unclip.serving.config import ReplicaConfig, ServeConfig

PLATFORMS = [leaf for leaf in leaves() if leaf != "monitoring" and not leaf.partition("+")[0].endswith("jobs")]
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture(params=PLATFORMS)
def service(request: pytest.FixtureRequest) -> Object:
    """The RayService of a platform."""
    return next(found for found in build(request.param) if found["kind"] == "RayService")


@pytest.fixture
def schema(service: Object) -> Mapping[str, Any]:
    """Its configuration, as Serve's REST API reads it."""
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(given)
    return given


@pytest.fixture
def config(schema: Mapping[str, Any]) -> ServeConfig:
    """What our `build` makes of it."""
    (application,) = schema["applications"]
    return read_args(application["args"])


def serving_pod(service: Object) -> Pod:
    (found,) = [pod for pod in pods(service) if pod.role == "worker"]
    return found


def test_the_application_is_imported_from_where_it_is(schema: Mapping[str, Any]) -> None:
    for application in schema["applications"]:
        module, _, attribute = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_serve_listens_where_the_pods_say(service: Object, schema: Mapping[str, Any]) -> None:
    assert schema["proxy_location"] == "EveryNode", "workers are behind the service, not the head"
    assert schema["http_options"]["host"] == "0.0.0.0"
    assert schema["http_options"]["port"] == Place.of(serving_pod(service)).ports["serve"]


def test_deployments_are_those_that_are_built(schema: Mapping[str, Any], config: ServeConfig) -> None:
    built = {INGRESS, *(group_name(group.stages) for group in config.groups)}
    for deployment in schema["applications"][0]["deployments"]:
        assert deployment["name"] in built
        assert UserConfig.from_dict(deployment["user_config"]).bundle, deployment["name"]


def test_only_who_has_a_key_may_ask(service: Object, config: ServeConfig) -> None:
    assert config.keys, "everybody may ask"
    pod = serving_pod(service)
    folder, _, file = config.keys.rpartition("/")
    mount = next(mount for mount in pod.main["volumeMounts"] if mount["mountPath"] == folder)
    volume = next(volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
    assert (volume["secret"]["secretName"], file) == ("unclip-api-keys", "keys.json")
    assert mount["readOnly"]
    assert "subPath" not in mount, "a changed Secret would not be seen"


def test_pods_have_time_to_end_what_is_under_way(service: Object, config: ServeConfig) -> None:
    pod = serving_pod(service)
    under_way = config.limits.timeout_s + DRAIN_S
    assert under_way < float(pod.env[DRAIN]) < pod.spec["terminationGracePeriodSeconds"]
    assert service["spec"].get("rayClusterDeletionDelaySeconds", 60) > config.limits.timeout_s


def test_processes_fit_the_pods(service: Object, config: ServeConfig) -> None:
    """Each claims no more than one pod has, and all of them together no more than the group may become."""
    pod = serving_pod(service)
    limits, most = pod.main["resources"]["limits"], pod.group["maxReplicas"]
    cpus, gpus = float(quantity(limits["cpu"])), float(quantity(limits.get("nvidia.com/gpu", 0)))
    parts: list[ReplicaConfig] = [config.ingress, *config.groups]
    assert all(part.num_cpus <= cpus and part.num_gpus <= gpus for part in parts)
    assert sum(part.max_replicas * part.num_gpus for part in parts) <= most * gpus
    assert sum(part.max_replicas * part.num_cpus for part in parts) <= most * cpus
    assert (gpus > 0) == any(part.num_gpus > 0 for part in parts), "a GPU draws where there is one"
    assert pod.group["minReplicas"] <= most


def test_the_head_answers_no_requests(service: Object) -> None:
    """It has no CPUs for processes; a proxy there would be one hop more, and end with the control plane."""
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
