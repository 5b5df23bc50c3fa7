"""A server's meters where Prometheus finds them, under the names that the dashboard asks for."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest
import ray

from unclip.cluster.serve.meters import RayMeters
from unclip.serving.observe.catalogue import CATALOGUE

WAIT_S = 60.0
"""Ray hands metrics on every 10 s."""
SUFFIX = {"counter": "_total", "gauge": "", "histogram": "_count"}
VALUE = {"counter": 5.0, "gauge": 7.0, "histogram": 1.0}


def test_every_meter_can_be_scraped() -> None:
    meters = RayMeters()
    for name, meter in CATALOGUE.items():
        labels = dict.fromkeys(meter.labels, "scraped")
        match meter.kind:
            case "counter":
                meters.count(name, 2.0, **labels)
                meters.count_to(name, 3.0, **labels)
                meters.count_to(name, 3.0, **labels)
            case "gauge":
                meters.set(name, 7.0, **labels)
            case "histogram":
                meters.observe(name, 0.3, **labels)
    expected = {f"ray_{name}{SUFFIX[meter.kind]}": VALUE[meter.kind] for name, meter in CATALOGUE.items()}
    values = scraped(set(expected))
    assert {name: values[name] for name in expected} == expected


def test_labels_and_names_are_those_of_the_catalogue() -> None:
    with pytest.raises(ValueError, match="unclip_serve_slots: labels are group"):
        RayMeters().set("unclip_serve_slots", 1.0, group="all")


def scraped(awaited: set[str]) -> dict[str, float]:
    """Values of this server's series, as soon as all awaited ones are there."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, values = time.monotonic() + WAIT_S, dict[str, float]()
    while not awaited <= values.keys() and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
        found = [re.fullmatch(r"(ray_unclip_serve_\w+)\{.*\} (\S+)", line) for line in lines]
        values = {match[1]: float(match[2]) for match in found if match}
    return values
