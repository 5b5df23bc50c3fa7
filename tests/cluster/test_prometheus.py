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
