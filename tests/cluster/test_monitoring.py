"""Alerts and dashboards ask for nothing but what a running app exports: a training, a bulk job and a server on Ray."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.placement_group import placement_group, remove_placement_group
from tests.cluster.test_serve_meters import SUFFIX
from tests.support.bundles import save_tiny_bundle
from tests.support.monitoring import ALERTS, DASHBOARDS, asked, queries

from unclip.cluster.fit import fit
from unclip.cluster.generate import run_generate
from unclip.cluster.serve import build
from unclip.generation.bulk.config import GenerateConfig
from unclip.recipes import RECIPES
from unclip.serving.errors import Overloaded
from unclip.serving.observe.catalogue import CATALOGUE

PATIENCE_S = 60.0
"""Ray hands metrics on every 10 s."""
EXPRESSIONS = [*(rule["expr"] for rule in ALERTS.values()), *(query for name in DASHBOARDS for query in queries(name))]
ASKED = {question for expression in EXPRESSIONS for question in asked(expression)}
ELSEWHERE = {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram", "cluster_"))}
"""Ray exports these where there are GPUs, and from a head that an autoscaler works for."""
EVENTS = {f"ray_{name}{suffix}" for name, meter in CATALOGUE.items() for suffix in ("_bucket", "_total", "")}
"""Of servers, many are there only after an event; test_serve_meters.py finds all of them."""
NOT_HERE = {("reason", str(Overloaded("", retry_after=1).code)), ("end", "failed"), ("Name", "GPU")}
"""Values of labels that take a fault, or a GPU."""
LINE = re.compile(r"(ray_\w+)\{(.*)\} \S+")
LABEL = re.compile(r"(\w+)=\"([^\"]*)\"")

Labels = dict[str, str]


@pytest.fixture(scope="module")
def exported(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Labels]]:
    """The labels of all series that were there while the app ran, by the name of their metric."""
    folder, prices = tmp_path_factory.mktemp("monitored"), {"cpu_hour": 0.05, "budget": 100.0}
    bundle = str(folder / "bundle")
    save_tiny_bundle(bundle)
    with scraped() as found:
        waiting = placement_group([{"CPU": 10_000.0}])
        stranded = ray.remote(lambda: None).options(num_cpus=10_000).remote()
        ray.wait([ray.remote(lambda: 1 / 0).remote()])
        with server(bundle):
            fit(
                RECIPES["clip"]["debug"]().merged(
                    {
                        "run": str(folder / "run"),
                        "bundle": None,
                        "data": {"path": f"{openmoji}/64/train"},
                        "validation": {"data": f"{openmoji}/64/compositional", "every_steps": 4},
                        "loop": {"max_steps": 4, "log_every": 1, "checkpoint_every_s": 0.0},
                        "cost": prices,
                    }
                )
            )
            generation = {"bundle": bundle, "prompt": "a red heart", "out": str(folder / "out"), "cost": prices}
            run_generate(GenerateConfig.from_dict(generation))
            deadline = time.monotonic() + PATIENCE_S
            while missing(found) and time.monotonic() < deadline:
                time.sleep(1.0)
        remove_placement_group(waiting)
        ray.cancel(stranded)
    return found


def missing(found: Mapping[str, list[Labels]]) -> set[str]:
    return {question.metric for question in ASKED} - found.keys() - ELSEWHERE - EVENTS


@contextmanager
def scraped() -> Iterator[Mapping[str, list[Labels]]]:
    """Labels of the series that are there at any time in the block; it grows meanwhile."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, list[Labels]] = defaultdict(list)
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(2.0):
            lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
            for name, labels in (match.groups() for match in map(LINE.fullmatch, lines) if match):
                found[name].append(dict(LABEL.findall(labels)))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@contextmanager
def server(bundle: str) -> Iterator[None]:
    """One of one process."""
    folder = str(Path(bundle).parent / "batches")
    settings = {"recipe": "all-in-one", "ingress": {"num_cpus": 0.1}, "bundle": bundle, "batches.folder": folder}
    serve.start(http_options={"host": "127.0.0.1", "port": 0})
    try:
        serve.run(build(settings), name="monitored", route_prefix="/monitored")
        yield
    finally:
        serve.shutdown()


def test_every_metric_is_exported(exported: Mapping[str, list[Labels]]) -> None:
    assert missing(exported) == set()
    known = {f"ray_{name}{suffix}" for name, meter in CATALOGUE.items() for suffix in ("_bucket", SUFFIX[meter.kind])}
    assert {question.metric for question in ASKED if question.metric.startswith("ray_unclip_serve_")} <= known
    assert len(ASKED) > 80


def test_series_have_the_labels_that_are_asked_for(exported: Mapping[str, list[Labels]]) -> None:
    for question in ASKED:
        series = exported.get(question.metric, ())
        values = {pair for labels in series for pair in labels.items()}
        if series:
            assert question.labels <= {label for label, _ in values}, question
            assert question.values <= values | NOT_HERE, question
