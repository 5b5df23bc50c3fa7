"""What alerts and dashboards ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
DASHBOARDS: Mapping[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "dashboards").glob("*.json"))
}
RULES: Mapping[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["spec"]
ALERTS: Mapping[str, Mapping[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
SCRAPED = ("ray_io_cluster", "ray_io_group", "ray_io_node_type", "instance")
"""Labels that a pod's series get from being scraped."""
_SELECTOR = re.compile(r"\b(ray_\w+)(?:\{([^}]*)\})?(?![\w\"(])")
_MATCHER = re.compile(r"(\w+)(=~|!=|!~|=)\"([^\"]*)\"")
_GROUPED = re.compile(r"(?:by|on) \(([^)]*)\)")


@dataclass(frozen=True)
class Asked:
    """A metric that an expression reads, the labels that it has to have, and values that some of them have to take."""

    metric: str
    labels: frozenset[str]
    values: frozenset[tuple[str, str]]


def queries(name: str) -> list[str]:
    """All expressions of a dashboard, those of its variables among them."""
    dashboard = DASHBOARDS[name]
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())] + variables


def asked(expression: str) -> Iterator[Asked]:
    """By an expression whose operands are grouped in the same way."""
    grouped = {label.strip() for found in _GROUPED.findall(expression) for label in found.split(",")}
    bare = _GROUPED.sub("", expression)
    for metric, selector in _SELECTOR.findall(bare):
        if metric in SCRAPED:
            continue
        matchers = _MATCHER.findall(selector or "")
        labels = {label for label, _, _ in matchers} | (grouped - set(SCRAPED))
        yield Asked(
            metric, frozenset(labels), frozenset((label, value) for label, kind, value in matchers if kind == "=")
        )
