"""A server's configuration as a Serve application: which deployments there are, what they claim, how they scale."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException

from unclip.cluster import preflight
from unclip.cluster.serve.addresses import resolved
from unclip.cluster.serve.replicas import Ingress, StageReplica, UserConfig, group_name, on_its_device, stages_of
from unclip.cluster.serve.scaling import ByQueuedSteps
from unclip.config.base import ConfigError
from unclip.pipelines.bundle import BundleError
from unclip.serving.config import RECIPES, GroupConfig, GroupStage, ReplicaConfig, ServeConfig
from unclip.serving.stages.model import Model

INGRESS = "Ingress"
"""Name of the deployment that speaks HTTP."""
DRAIN_S = 30.0
"""Beyond the longest time that a request has, how long a process is waited for that shall end."""
_STARTS = 3
_DRAIN_LOOK_S = 0.5
_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 30.0
_UPSCALE_S = 10.0
_DOWNSCALE_S = 300.0
_LOOK_BACK_S = 20.0
_PATHS = {
    "policy": ("blocklist",),
    "provenance": ("c2pa_certificates", "c2pa_key"),
    "pictures": ("folder",),
    "batches": ("folder",),
}
Stages = tuple[GroupStage, ...]
_log = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> Application:
    """What `serve run unclip.cluster.serve:build` and the `import_path` of a Serve configuration call.

    Args:
        args: `recipe`, one of `RECIPES`, and fields of `ServeConfig` laid over it, dotted (`limits.pictures`) or nested;
            texts are read as the values of `--set` are.

    Raises `RayServeException`, which Serve shows by its message alone, for what `application` refuses.
    """
    try:
        return application(read_args(args))
    except (ConfigError, BundleError, OSError) as error:
        raise RayServeException(f"unclip: {error}") from None


def read_args(args: Mapping[str, Any]) -> ServeConfig:
    """Of `build`; `ConfigError` names what is unknown or wrong."""
    fields = dict(args)
    recipe = fields.pop("recipe", next(iter(RECIPES)))
    if recipe not in RECIPES:
        raise ConfigError(f"recipe = {recipe!r}: one of {', '.join(RECIPES)}")
    texts = {path: value if isinstance(value, str) else json.dumps(value) for path, value in fields.items()}
    return RECIPES[recipe]().override([f"{path}={text}" for path, text in texts.items()])


def application(config: ServeConfig) -> Application:
    """A deployment for each group of stages that the bundle has, and `Ingress`; reads manifests, and no weights.

    Raises `ConfigError`, `BundleError` or `OSError` for what could not be served.
    """
    if not config.bundle:
        raise ConfigError("bundle: name the folder or s3:// address of a trained bundle")
    config = _with_absolute_paths(config)
    stages = stages_of(Model.load(config.bundle, config.options))
    groups = _groups(config, stages)
    _warn_of_claims(config, groups)
    apps = [(held, _stage_replicas(config, group, held)) for group, held in groups]
    options = _options(config, config.ingress) | {
        "name": INGRESS,
        "max_ongoing_requests": config.ingress.max_connections,
        "max_queued_requests": config.ingress.max_connections,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1.0},
    }
    return serve.deployment(**options)(Ingress).bind(config, stages, apps)


def _groups(config: ServeConfig, stages: Stages) -> list[tuple[GroupConfig, Stages]]:
    """The groups that have something to hold, with it; all of the bundle's `stages` are in one of them, or there are none."""
    pairs = [(group, tuple(stage for stage in group.stages if stage in stages)) for group in config.groups]
    groups = [(group, held) for group, held in pairs if held]
    if not config.groups:
        return groups
    if missing := set(stages) - {stage for _, held in groups for stage in held}:
        raise ConfigError(f"groups: none holds {', '.join(sorted(missing))} of the bundle {config.bundle!r}")
    clip = (("the group of clip", group) for group in config.groups if group.stages == ("clip",))
    for name, part in (("ingress", config.ingress), *clip):
        if part.max_replicas != part.min_replicas:
            raise ConfigError(
                f"{name}: max_replicas = {part.max_replicas}: such processes take no denoising steps to be scaled by;"
                f" set it to min_replicas = {part.min_replicas}"
            )
    return groups


def _stage_replicas(config: ServeConfig, group: GroupConfig, held: Stages) -> Application:
    options = _options(config, group) | {
        "name": group_name(held),
        # all that are admitted, as often again for texts and pictures to be encoded, and those that are being cancelled
        "max_ongoing_requests": 3 * config.limits.pictures,
    }
    return serve.deployment(**options)(StageReplica).bind(on_its_device(config, group), held, group.memory_share)


def _options(config: ServeConfig, replica: ReplicaConfig) -> dict[str, Any]:
    """What all deployments have in common."""
    return {
        "ray_actor_options": {"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus},
        "user_config": UserConfig(bundle=config.bundle).to_dict(),
        "graceful_shutdown_timeout_s": config.limits.timeout_s + DRAIN_S,
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOK_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "max_constructor_retry_count": _STARTS,
        **_replicas(replica),
    }


def _replicas(replica: ReplicaConfig) -> dict[str, Any]:
    """How many there are."""
    if replica.min_replicas == replica.max_replicas:
        return {"num_replicas": replica.min_replicas}
    policy = AutoscalingPolicy(policy_function=ByQueuedSteps, policy_kwargs={"queued_steps": replica.queued_steps})
    scaling = AutoscalingConfig(
        min_replicas=replica.min_replicas,
        max_replicas=replica.max_replicas,
        policy=policy,
        upscale_delay_s=_UPSCALE_S,
        downscale_delay_s=_DOWNSCALE_S,
        look_back_period_s=_LOOK_BACK_S,
    )
    return {"autoscaling_config": scaling}


def _with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """Processes run in other folders than whoever starts them."""
    changes: dict[str, Any] = {"bundle": resolved(config.bundle)}
    for owner, fields in _PATHS.items():
        part = getattr(config, owner)
        changes[owner] = {field: resolved(path) for field in fields if (path := getattr(part, field))}
    if config.keys:
        changes["keys"] = resolved(config.keys)
    return config.merged(changes)


def _warn_of_claims(config: ServeConfig, groups: list[tuple[GroupConfig, Stages]]) -> None:
    """Serve waits for what the cluster lacks, since nodes may come; that it does is said."""
    if not ray.is_initialized():
        return
    parts = [config.ingress, *(group for group, _ in groups)]
    nodes = preflight.cluster_nodes()
    for kind in ("cpus", "gpus"):
        claim = sum(part.min_replicas * float(getattr(part, f"num_{kind}")) for part in parts)
        there = sum(float(getattr(node, kind)) for node in nodes)
        if claim > there:
            _log.warning(
                f"the deployments claim {claim:g} {kind.upper()}, and the cluster has {there:g}: Serve waits for more"
            )
    if config.device == "auto" and any(node.gpus for node in nodes) and not any(part.num_gpus for part in parts):
        _log.warning(
            "the cluster has GPUs and nothing claims one, so that CPUs draw: set ingress.num_gpus, or the groups'"
        )
