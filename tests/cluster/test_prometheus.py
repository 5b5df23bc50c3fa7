"""A run's numbers where Prometheus finds them: scraped from the node's own endpoint."""

from __future__ import annotations

import re
import time
import urllib.request

import ray
from tests.support.run_records import record, restart, run_config

from unclip.cluster.prometheus import PrometheusView
from unclip.training.reporting.run_tail import News

WAIT_S = 60.0
"""Ray hands metrics on every 10 s."""


def test_the_newest_values_can_be_scraped() -> None:
    view = PrometheusView()
    view.open(run_config("runs/scraped"))
    validation = {"step": 1, "metrics": {"loss/t 0-250": 0.75}, "samples": None}
    view.show(News(records=(record(1), record(2)), validations=(validation,), restarts=(restart(1),)))
    values = scraped('run="runs/scraped"', "ray_unclip_validation_loss_t_0_250")
    assert values["ray_unclip_train_loss"] == 0.5
    assert values["ray_unclip_train_step"] == 2
    assert values["ray_unclip_train_restarts"] == 1
    assert values["ray_unclip_train_images_per_second"] == 4.0
    assert values["ray_unclip_time_backward"] == 0.5
    assert values["ray_unclip_validation_loss_t_0_250"] == 0.75


def test_what_alerts_go_by_stays_as_long_as_the_run() -> None:
    """A run that stalls sets no gauge, and Ray drops those that are not set for 20 s."""
    began = time.time()
    view = PrometheusView()
    limits = {"loop": {"stall_limit_s": 77.0}, "cost": {"budget": 5.0}}
    view.open(run_config("runs/stalled").merged(limits))
    failed = record(40, checkpoint_step=20, checkpoint_error="checkpoint of step 30: the disk is full")
    reasons = ("the process died", "CUDA error: unspecified launch failure", "CUDA out of memory")
    restarts = (restart(10), *(restart(20, reason) for reason in reasons))
    cost = {"gpu_hours": 1.5, "cpu_hours": 3.0, "dollars": None}
    view.show(News(records=(failed,), restarts=restarts, cost=cost))
    time.sleep(30.0)
    values = scraped('run="runs/stalled"', "ray_unclip_train_gpu_hours")
    expected = {
        "stall_limit_seconds": 77.0,
        "checkpoint_every_seconds": run_config("runs/stalled").loop.checkpoint_every_s,
        "checkpoint_failed": 1.0,
        "restarts": 4.0,
        "failures_in_a_row": 3.0,
        "gpu_failures": 1.0,
        "gpu_hours": 1.5,
        "cpu_hours": 3.0,
        "budget_dollars": 5.0,
    }
    assert {name: values[f"ray_unclip_train_{name}"] for name in expected} == expected
    for what in ("step", "checkpoint"):
        assert began <= values[f"ray_unclip_train_newest_{what}_time_seconds"] < began + 10
    assert "ray_unclip_train_cost_dollars" not in values
    view.close()


def scraped(tag: str, awaited: str) -> dict[str, float]:
    """Values of the gauges with that tag, as soon as the awaited one is among them."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, values = time.monotonic() + WAIT_S, dict[str, float]()
    while awaited not in values and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
        found = [re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line) for line in lines]
        values = {
            match[1]: float(match[3]) for match in found if match and tag in match[2] and 'stage="prior"' in match[2]
        }
    return values
