"""Runbooks: each alert has one, and what they name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.support.monitoring import ALERTS

from unclip.training.config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = "docs/runbooks.md"


def sections() -> dict[str, str]:
    """The runbooks' texts by the anchors of their headings."""
    _, *parts = (REPOSITORY / DOCUMENT).read_text(encoding="utf-8").split("\n## ")
    split = [part.partition("\n") for part in parts]
    return {heading.lower().replace(" ", "-"): text for heading, _, text in split}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_runbook_that_names_it(alert: str) -> None:
    document, anchor = ALERTS[alert]["annotations"]["runbook"].split("#")
    assert document == DOCUMENT
    assert f"`{alert}`" in sections()[anchor]


@pytest.mark.parametrize("anchor", sections())
def test_a_runbook_says_how_it_is_seen_where_to_look_what_to_do_and_how_it_was_made_to_happen(anchor: str) -> None:
    text = sections()[anchor]
    assert re.findall(r"^\*(.+?)\*:", text, re.MULTILINE) == ["Seen", "Look", "Do", "Made to happen"]
    named = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", text.partition("*Look*")[0]))
    assert named <= set(ALERTS)
    assert re.search(r"`(tests/|python )", text.partition("*Made to happen*")[2])


def test_the_tests_that_runbooks_name_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", "".join(sections().values()))
    assert len(named) >= 10
    for file, function in named:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_settings_that_runbooks_name_exist() -> None:
    named = re.findall(r"`(?:--set )?(loop|resources|cost|optimizer)\.(\w+)", "".join(sections().values()))
    assert named
    for group, field in named:
        assert field in TrainConfig.model_fields[group].annotation.model_fields, f"{group}.{field}"
