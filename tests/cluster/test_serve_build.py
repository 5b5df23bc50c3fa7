"""What `build` makes of its arguments, by what Serve would deploy, and how many processes it is told to have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.build_app import build_app
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.deployment import Deployment
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema
from starlette.types import Message
from tests.support.bundles import save_tiny_bundle

from unclip.cluster.serve import build
from unclip.cluster.serve.application import read_args
from unclip.cluster.serve.gate import Doors, Gate
from unclip.cluster.serve.scaling import ByQueuedSteps
from unclip.config.base import ConfigError
from unclip.serving.config import all_in_one, per_stage

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle"))
    save_tiny_bundle(folder)
    return folder


def _deployments(args: Mapping[str, Any]) -> dict[str, Deployment]:
    """In the order in which Serve would start them, the one that speaks HTTP last."""
    return {each.name: each for each in build_app(build(dict(args)), name="unclip").deployments}


def test_texts_of_the_command_line_are_read_as_their_fields_are() -> None:
    args = {"bundle": "s3://b/v1", "model": "12", "limits.pictures": "4", "aliases": "[a, b]", "keys": "null"}
    config = read_args(args)
    assert (config.bundle, config.model, config.limits.pictures) == ("s3://b/v1", "12", 4)
    assert (config.aliases, config.keys) == (("a", "b"), None)


def test_dotted_and_nested_arguments_lie_over_the_recipe() -> None:
    groups = [{"stages": ["clip", "prior"], "num_gpus": 0.5}, {"stages": ["decoder"], "num_gpus": 1e-3}]
    args = {"recipe": "per-stage", "bundle": "b", "groups": groups, "limits": {"timeout_s": 1e-5}, "model": "m"}
    assert read_args(args) == per_stage().merged({name: value for name, value in args.items() if name != "recipe"})
    assert read_args({}) == all_in_one()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"recipe": "per-stag"}, "recipe = 'per-stag'.*all-in-one, per-stage"),
        ({"limit.pictures": "4"}, "limit"),
        ({"limits": {"pictures": 0}}, "limits.pictures"),
        ({}, "bundle"),
        ({"bundle": "/nowhere"}, "'/nowhere' is no bundle"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(args: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RayServeException, match=f"^unclip: .*{message}") as found:
        build(dict(args))
    assert found.value.__cause__ is None
    assert len(str(found.value).splitlines()) == 1


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="picturs"):
        read_args({"limits.picturs": "4"})


def test_addresses_may_name_what_the_environment_has(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", f"{Path(bundle).parent}/")
    args = {
        "bundle": f"${{STORE}}/{Path(bundle).name}",
        "keys": "$STORE/keys.json",
        "pictures": {"folder": "s3://b/$STORE"},
    }
    ingress = _deployments(args)["Ingress"]
    assert ingress.user_config == {"bundle": bundle}
    config = ingress.init_args[0]
    assert (config.bundle, config.keys) == (bundle, f"{Path(bundle).parent}/keys.json")
    assert config.pictures.folder == f"s3://b/{Path(bundle).parent}"
    monkeypatch.delenv("STORE")
    with pytest.raises(RayServeException, match=r"STORE\}/.*': STORE is not set"):
        build(args)


def test_one_process_holds_all_stages(bundle: str) -> None:
    args = {"bundle": bundle, "ingress.num_gpus": "0.5", "ingress.max_connections": 77, "limits.timeout_s": 50}
    [(name, ingress)] = _deployments(args).items()
    assert name == "Ingress"
    assert ingress.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 0.5}
    assert ingress.user_config == {"bundle": bundle}
    assert (ingress.max_ongoing_requests, ingress.max_queued_requests) == (77, 77)
    assert ingress._deployment_config.graceful_shutdown_timeout_s > 50
    assert ingress.num_replicas == 1


def test_a_group_of_stages_is_a_deployment_that_scales_by_its_steps(bundle: str) -> None:
    deployments = _deployments({"recipe": "per-stage", "bundle": bundle, "limits.pictures": 20})
    assert list(deployments) == ["clip", "prior", "decoder", "upsampler_256", "Ingress"]  # the bundle ends there
    assert {each.user_config["bundle"] for each in deployments.values()} == {bundle}
    assert deployments["Ingress"].num_replicas == 2
    decoder = deployments["decoder"]
    assert decoder.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert decoder.max_ongoing_requests >= 2 * 20
    scaling = decoder._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 8)
    assert scaling.policy.policy_kwargs == {"queued_steps": 2000}


def test_groups_hold_all_that_the_bundle_has(bundle: str) -> None:
    groups = [{"stages": ["clip", "prior"]}, {"stages": ["decoder"]}]
    args = {"recipe": "per-stage", "bundle": bundle, "groups": groups}
    with pytest.raises(RayServeException, match="groups: none holds upsampler_256"):
        build(args)
    deployments = _deployments({**args, "options.up_to": 16, "ingress.max_replicas": 2})  # then nothing goes through it
    assert list(deployments) == ["clip-prior", "decoder", "Ingress"]


def test_processes_without_steps_do_not_scale(bundle: str) -> None:
    with pytest.raises(RayServeException, match=r"ingress: max_replicas = 3.*min_replicas = 2"):
        build({"recipe": "per-stage", "bundle": bundle, "ingress.max_replicas": 3})
    rest = {"stages": ["prior", "decoder", "upsampler_256"], "max_replicas": 4}
    with pytest.raises(RayServeException, match=r"group of clip: max_replicas = 2.*min_replicas = 1"):
        build({"recipe": "per-stage", "bundle": bundle, "groups": [{"stages": ["clip"], "max_replicas": 2}, rest]})


def test_what_the_cluster_does_not_have_is_said(bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build({"recipe": "per-stage", "bundle": bundle})
    assert "claim 2 GPUS, and the cluster has 0" in caplog.text


@pytest.mark.parametrize(
    ("queued", "running", "wanted"),
    [
        ({"a": 0.0}, 1, 1),
        ({"a": 2000.0}, 1, 1),
        ({"a": 2001.0}, 1, 2),
        ({"a": 2000.0, "b": 1999.0}, 2, 2),
        ({"a": 7000.0, "b": 1500.0}, 2, 5),
        ({"a": 10.0, "b": 20.0}, 3, 1),
        ({}, 3, 3),
    ],
)
def test_processes_by_queued_steps(queued: Mapping[str, float], running: int, wanted: int) -> None:
    assert _decisions([queued], running=running, delay_s=0.0) == [wanted]


def test_serve_waits_before_it_adds_or_takes_away() -> None:
    burst = {"a": 9000.0}
    assert _decisions([burst, burst, {"a": 10.0}, burst, burst], running=1, delay_s=1000.0) == [1] * 5


def _decisions(reports: list[Mapping[str, float]], *, running: int, delay_s: float) -> list[int]:
    """Of the policy as a deployment has it, in Serve's own frame of delays and bounds."""
    policy = AutoscalingPolicy(policy_function=ByQueuedSteps, policy_kwargs={"queued_steps": 2000})
    delays = {"upscale_delay_s": delay_s, "downscale_delay_s": delay_s}
    config = AutoscalingConfig(min_replicas=1, max_replicas=8, policy=policy, **delays)
    decide = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
    state: dict[str, Any] = {}
    decisions = []
    for report in reports:
        wanted, state = decide(_context(config, {"queued_steps": report}, running, state))
        decisions.append(wanted)
    return decisions


def _context(config: AutoscalingConfig, metrics: Any, running: int, state: dict[str, Any]) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="decoder",
        app_name="unclip",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state=state,
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=config,
    )


def test_shut_doors_wait_for_who_is_in_and_refuse_who_comes() -> None:
    async def run() -> tuple[list[Message], bool, bool]:
        doors, go_on, sent = Doors(), asyncio.Event(), []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await go_on.wait()

        async def send(message: Message) -> None:
            sent.append(message)

        gate = Gate(app, doors)
        inside = asyncio.create_task(gate({"type": "http"}, None, send))
        await asyncio.sleep(0)
        in_vain = await doors.drain(0.0)
        await gate({"type": "http"}, None, send)
        go_on.set()
        await inside
        return sent, in_vain, await doors.drain(0.0)

    sent, in_vain, done = asyncio.run(run())
    assert (sent[0]["status"], in_vain, done) == (503, False, True)
    assert (b"retry-after", b"5") in sent[0]["headers"]


def test_the_configurations_of_the_documentation_are_valid() -> None:
    blocks = [block.partition("```")[0] for block in DOCS.read_text().split("```yaml\n")[1:]]
    schemas = [ServeDeploySchema.model_validate(yaml.safe_load(block)) for block in blocks]
    assert schemas
    for schema in schemas:
        [application] = schema.applications
        assert application.import_path == "unclip.cluster.serve:build"
        config = read_args(application.args)
        names = {"Ingress", *("-".join(group.stages) for group in config.groups)}
        assert {each.name for each in application.deployments} == names
        assert len({each.user_config["bundle"] for each in application.deployments}) == 1
