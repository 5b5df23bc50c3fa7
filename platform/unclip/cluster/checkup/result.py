"""What a check has found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]
WORST_FIRST: tuple[Status, ...] = ("failed", "warning", "skipped", "ok")
_NODES_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """found: one line with figures; of what was skipped, the reason. advice: one line of what to do, empty where ok."""

    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Result(Finding):
    """A finding of the check of that name. node: the one it concerns, or empty where it concerns the cluster. seconds: that
    the whole check took.
    """

    check: str = ""
    node: str = ""
    seconds: float = 0.0


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, advice: str) -> Finding:
    """Of what makes runs slow or fragile, and does not stop them."""
    return Finding("warning", found, advice)


def failed(found: str, advice: str) -> Finding:
    return Finding("failed", found, advice)


def skipped(reason: str) -> Finding:
    return Finding("skipped", reason)


def lines(results: Sequence[Result]) -> list[str]:
    """The rows of one check's table, worst first. Many nodes that are alike, but for their figures, share a row."""
    rows = []
    for status in WORST_FIRST:
        alike: dict[str, list[Result]] = {}
        for result in results:
            if result.status == status:
                alike.setdefault(result.advice or status, []).append(result)
        for group in alike.values():
            shown = group if len(group) <= _NODES_SHOWN else group[:1]
            rows += [f"{status:<8} {result.check:<13} {_place(result, group, shown)}{result.found}" for result in shown]
            rows += [f"{'':<8} {'':<13} → {group[0].advice}"] if group[0].advice else []
    return rows


def _place(result: Result, group: Sequence[Result], shown: Sequence[Result]) -> str:
    if not result.node:
        return ""
    return f"{result.node}: " if len(shown) == len(group) else f"{len(group)} nodes, as {result.node}: "
