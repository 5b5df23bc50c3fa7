"""Alerts as promtool judges them: each fires on the series that it is for, and only on those."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.monitoring import ALERTS, DASHBOARDS, FOLDER, RULES

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: prometheus)")

RUN = 'run="r", stage="decoder"'
TRAIN = "ray_unclip_train_"
SERVE = "ray_unclip_serve_"
LIMITS = {f"{TRAIN}stall_limit_seconds{{{RUN}}}": "1800x120", f"{TRAIN}checkpoint_every_seconds{{{RUN}}}": "600x120"}
ENGINE = 'WorkerId="w", group="all"'
DEPLOYED = 'application="images", deployment="Ingress"'
HISTOGRAM = {
    f'{SERVE}request_seconds_bucket{{route="/v1/images/generations", le="{bound}"}}': series
    for bound, series in (("10", "0x120"), ("80", "0+60x120"), ("+Inf", "0+60x120"))
}
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "TrainingStalled": (
        LIMITS | {f"{TRAIN}newest_step_time_seconds{{{RUN}}}": "0x120"},
        LIMITS | {f"{TRAIN}newest_step_time_seconds{{{RUN}}}": "0+60x120"},
    ),
    "TrainingWaitsForData": (
        {f"ray_unclip_time_data{{{RUN}}}": "0.4x120"},
        {f"ray_unclip_time_data{{{RUN}}}": "0.1x120"},
    ),
    "TrainingFailsInARow": (
        {f"{TRAIN}failures_in_a_row{{{RUN}}}": "0x50 2x70"},
        {f"{TRAIN}failures_in_a_row{{{RUN}}}": "1x120"},
    ),
    "TrainingGpuFails": (
        {f"{TRAIN}gpu_failures{{{RUN}}}": "2x80 3x40"},
        {f"{TRAIN}gpu_failures{{{RUN}}}": "3x120"},
    ),
    "TrainingSkipsSteps": (
        {f"{TRAIN}skipped_steps{{{RUN}}}": "7x110 12x10"},
        {f"{TRAIN}skipped_steps{{{RUN}}}": "7x120"},
    ),
    "LossRises": (
        {f"{TRAIN}loss{{{RUN}}}": "0.1x60 0.5x60"},
        {f"{TRAIN}loss{{{RUN}}}": "0.1x60 0.13x60"},
    ),
    "CheckpointFails": (
        {f"{TRAIN}checkpoint_failed{{{RUN}}}": "0x60 1x60"},
        {f"{TRAIN}checkpoint_failed{{{RUN}}}": "0x60 1x2 0x60"},
    ),
    "CheckpointOld": (
        LIMITS | {f"{TRAIN}newest_checkpoint_time_seconds{{{RUN}}}": "0x120"},
        LIMITS | {f"{TRAIN}newest_checkpoint_time_seconds{{{RUN}}}": "0+60x120"},
    ),
    "BudgetExceeded": (
        {f"{TRAIN}cost_dollars{{{RUN}}}": "0+1x120", f"{TRAIN}budget_dollars{{{RUN}}}": "100x120"},
        {f"{TRAIN}cost_dollars{{{RUN}}}": "0+1x120"},
    ),
    "JobStalled": (
        {
            'ray_unclip_job_progress_time_seconds{kind="generate", out="o"}': "600x120",
            'ray_unclip_job_done{kind="generate", out="o"}': "5x120",
            'ray_unclip_job_expected{kind="generate", out="o"}': "9x120",
        },
        {
            'ray_unclip_job_progress_time_seconds{kind="generate", out="o"}': "600x120",
            'ray_unclip_job_done{kind="generate", out="o"}': "9x120",
            'ray_unclip_job_expected{kind="generate", out="o"}': "9x120",
        },
    ),
    "NodeSilent": ({'up{ray_io_cluster="unclip"}': "0x120"}, {'up{job="other"}': "0x120"}),
    "HeadSilent": ({"ray_cluster_active_nodes": "1x60 stale"}, {"ray_cluster_active_nodes": "1x120"}),
    "NoRoom": (
        {
            'ray_placement_groups{State="PENDING"}': "1x120",
            'ray_scheduler_unscheduleable_tasks{Reason="Infeasible"}': "0x120",
        },
        {
            'ray_placement_groups{State="CREATED"}': "1x120",
            'ray_scheduler_unscheduleable_tasks{Reason="WaitingForResources"}': "9x120",
        },
    ),
    "ObjectStoreFull": (
        {"ray_object_store_used_memory": "95x120", "ray_object_store_available_memory": "5x120"},
        {"ray_object_store_used_memory": "50x120", "ray_object_store_available_memory": "50x120"},
    ),
    "SpillGrows": (
        {'ray_object_store_memory{Location="SPILLED"}': "0+100000000x120"},
        {'ray_object_store_memory{Location="SPILLED"}': "2000000000x120"},
    ),
    "DiskFull": (
        {"ray_node_disk_utilization_percentage": "90x120"},
        {"ray_node_disk_utilization_percentage": "80x120"},
    ),
    "MemoryFull": (
        {"ray_node_mem_used": "95x120", "ray_node_mem_total": "100x120"},
        {"ray_node_mem_used": "80x120", "ray_node_mem_total": "100x120"},
    ),
    "ServeFails": (
        {f'{SERVE}requests_total{{status="200"}}': "0+60x120", f'{SERVE}requests_total{{status="500"}}': "0+6x120"},
        {f'{SERVE}requests_total{{status="200"}}': "0+60x120", f'{SERVE}requests_total{{status="503"}}': "0+60x120"},
    ),
    "ServeSlow": (HISTOGRAM, {series.replace('"80"', '"20"'): values for series, values in HISTOGRAM.items()}),
    "ServeRefuses": (
        {f"{SERVE}requests_total": "0+60x120", f'{SERVE}refused_total{{reason="overloaded"}}': "0+30x120"},
        {f"{SERVE}requests_total": "0+60x120", f'{SERVE}refused_total{{reason="invalid_api_key"}}': "0+30x120"},
    ),
    "EngineStuck": (
        {f"{SERVE}queued_steps{{{ENGINE}}}": "40x120", f'{SERVE}steps_total{{{ENGINE}, stage="prior"}}': "9x120"},
        {f"{SERVE}queued_steps{{{ENGINE}}}": "40x120", f'{SERVE}steps_total{{{ENGINE}, stage="prior"}}': "0+60x120"},
    ),
    "StageFails": (
        {f'{SERVE}engine_requests_total{{group="all", end="failed"}}': "0+1x120"},
        {f'{SERVE}engine_requests_total{{group="all", end="cancelled"}}': "0+9x120"},
    ),
    "ServeNotRunning": (
        {'ray_serve_application_status{application="images"}': "6x60 1x60"},
        {'ray_serve_application_status{application="images"}': "5x60 6x60"},
    ),
    "ReplicaUnhealthy": (
        {f'ray_serve_deployment_replica_healthy{{{DEPLOYED}, replica="a"}}': "0x120"},
        {f'ray_serve_deployment_replica_healthy{{{DEPLOYED}, replica="a"}}': "1x120"},
    ),
    "ReplicasMissing": (
        {
            f"ray_serve_autoscaling_target_replicas{{{DEPLOYED}}}": "2x120",
            f'ray_serve_deployment_replica_healthy{{{DEPLOYED}, replica="a"}}': "1x120",
        },
        {
            f"ray_serve_autoscaling_target_replicas{{{DEPLOYED}}}": "1x120",
            f'ray_serve_deployment_replica_healthy{{{DEPLOYED}, replica="a"}}': "1x120",
        },
    ),
}
"""For each alert, series by the minute of two hours on which it fires at their end, and others on which it does not."""


@needs_promtool
@pytest.mark.parametrize("fires", [True, False])
def test_alerts_fire_where_they_should(tmp_path: Path, fires: bool) -> None:
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(RULES))
    cases = [case(name, fires) for name in ALERTS]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": cases}))
    done = promtool("test", "rules", str(tmp_path / "tests.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def case(alert: str, fires: bool) -> dict[str, Any]:
    """A test of promtool's: whether the alert, by its name alone, is among those that fire."""
    series = [{"series": name, "values": values} for name, values in SERIES[alert][not fires].items()]
    expression = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    expected = [{"labels": "{}", "value": 1}] if fires else []
    return {
        "name": alert,
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [{"expr": expression, "eval_time": "119m", "exp_samples": expected}],
    }


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "laptop.yml"])
def test_scrape_configs_are_valid(tmp_path: Path, name: str) -> None:
    """Debian's promtool is built without the discovery of pods, so that part is left out for it."""
    config = yaml.safe_load((FOLDER / name).read_text())
    for scraped in config["scrape_configs"]:
        scraped.pop("kubernetes_sd_configs", None)
    (tmp_path / name).write_text(yaml.safe_dump(config))
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(RULES))
    done = promtool("check", "config", str(tmp_path / name))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert {"summary", "description"} < set(rule["annotations"])


def test_the_kustomization_has_everything(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["namespace"] for each in objects} == {"unclip"}
    shown = [name for each in objects if each["kind"] == "ConfigMap" for name in each["data"]]
    assert sorted(shown) == [f"{name}.json" for name in DASHBOARDS]
    assert {each["kind"] for each in objects} == {"ConfigMap", "PodMonitor", "PrometheusRule"}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, check=False)
