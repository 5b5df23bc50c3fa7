"""Dashboards are of one form; that of servers shows all that they measure, by names that Ray exports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
from tests.support.monitoring import DASHBOARDS, queries

from unclip.serving.observe.catalogue import CATALOGUE, Meter

QUERIES = [target["expr"] for panel in DASHBOARDS["serving"]["panels"] for target in panel.get("targets", ())]
Dashboard = Mapping[str, Any]
each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exported(meter: str) -> set[str]:
    """The names under which Prometheus finds it."""
    return {f"ray_{meter}{suffix}" for suffix in SUFFIXES[CATALOGUE[meter].kind]}


def named(query: str) -> set[str]:
    return set(re.findall(r"ray_\w+", query))


def meters_of(query: str) -> list[Meter]:
    return [meter for name, meter in CATALOGUE.items() if exported(name) & named(query)]


def test_every_metric_on_it_is_in_the_catalogue() -> None:
    known = set().union(*map(exported, CATALOGUE))
    for query in queries("serving"):
        assert named(query)
        assert named(query) <= known, query


@pytest.mark.parametrize("meter", CATALOGUE)
def test_every_meter_is_on_it(meter: str) -> None:
    assert any(exported(meter) & named(query) for query in QUERIES)


@pytest.mark.parametrize("query", QUERIES)
def test_queries_group_and_filter_by_labels_that_there_are(query: str) -> None:
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    filtered = set(re.findall(r"(\w+)(?:=|!=|=~)\"", query))
    for meter in meters_of(query):
        extra = {"le"} if meter.kind == "histogram" else set()
        assert grouped <= set(meter.labels) | extra
        assert filtered <= {label for each in meters_of(query) for label in each.labels}
    assert query.count("(") == query.count(")")
    for name in re.findall(r"ray_\w+(?:_total|_bucket)\b", query):
        assert re.search(rf"rate\({name}(\{{[^}}]*\}})?\[\$__rate_interval\]\)", query), "counters are read as rates"


@each_dashboard
def test_lines_are_named_by_what_the_query_groups_by(dashboard: Dashboard) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), panel["title"]


@each_dashboard
def test_panels_fill_the_grid_without_covering_each_other(dashboard: Dashboard) -> None:
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for first, second in combinations((panel["gridPos"] for panel in dashboard["panels"]), 2):
        assert (
            first["x"] + first["w"] <= second["x"]
            or second["x"] + second["w"] <= first["x"]
            or first["y"] + first["h"] <= second["y"]
            or second["y"] + second["h"] <= first["y"]
        )


@each_dashboard
def test_every_panel_says_what_it_shows_and_asks_the_chosen_source(dashboard: Dashboard) -> None:
    for panel in dashboard["panels"]:
        if "targets" in panel:
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(
                source == SOURCE for source in (panel["datasource"], *(t["datasource"] for t in panel["targets"]))
            )
    assert [variable["name"] for variable in variables(dashboard, "datasource")] == ["datasource"]
    used = set(re.findall(r"\$(\w+)", " ".join(queries(dashboard["uid"].removeprefix("unclip-")))))
    assert used - {"__rate_interval"} == {variable["name"] for variable in variables(dashboard, "query")}


@each_dashboard
def test_it_says_what_to_do_where_a_threshold_is_passed(dashboard: Dashboard) -> None:
    (text,) = (panel["options"]["content"] for panel in dashboard["panels"] if panel["type"] == "text")
    advised = {title.lower() for title in re.findall(r"^\| \*\*([^*]+)\*\*", text, re.MULTILINE)}
    titles = {panel["title"].lower() for panel in dashboard["panels"]}
    assert advised <= titles
    for panel in dashboard["panels"]:
        thresholds = panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", ())
        assert len(thresholds) < 2 or panel["title"].lower() in advised
    assert {title.lower() for title in re.findall(r"\*([A-Z][^*|]+)\*", text)} <= titles | advised


def variables(dashboard: Dashboard, kind: str) -> list[dict[str, Any]]:
    return [variable for variable in dashboard["templating"]["list"] if variable["type"] == kind]
