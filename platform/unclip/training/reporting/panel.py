"""A run as a panel of text: what the terminal shows of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unclip.training.reporting.run_tail import News, Record
from unclip.training.reporting.view import BUCKET
from unclip.training.timing import PHASES

WIDTH, SPARK_WIDTH, BAR_WIDTH = 80, 40, 66
PHASE_STYLES = dict(
    zip((*PHASES, "other"), ("red", "bright_blue", "blue", "cyan", "yellow", "magenta", "bright_black"), strict=True)
)
"""Colour of each share of time, as in the curves: waiting for data is red."""


class RunPanel:
    """What is known of one run; rich draws it."""

    def __init__(self, title: str, run: str) -> None:
        self.title = title
        self.record: Record | None = None
        """The newest."""
        self._run = run
        self._losses: deque[float] = deque(maxlen=SPARK_WIDTH)
        self._restarts: list[Record] = []
        self._validation: Record | None = None
        self._saved_at = 0.0
        self._cost: Record | None = None

    def update(self, news: News) -> list[str]:
        """Takes in what came; returns what is to be said at once, a line each."""
        said = [describe_restart(record) for record in news.restarts]
        self._restarts += news.restarts
        for validation in news.validations:
            if "missed" in validation:
                said.append(f"validation of step {validation['step']} missed: {validation['missed']}")
            else:
                self._validation = validation
        for record in news.records:
            said += self._add(record)
        self._cost = news.cost or self._cost
        return said

    def _add(self, record: Record) -> list[str]:
        before = self.record or {}
        self.record = record
        if math.isfinite(record.get("loss", math.nan)):
            self._losses.append(record["loss"])
        if record.get("checkpoint_step") != before.get("checkpoint_step"):
            self._saved_at = record.get("seconds", 0.0)
        error = record.get("checkpoint_error")
        if error is not None and error != before.get("checkpoint_error"):
            return [f"checkpoint failed at step {record['step']}, training goes on: {error}"]
        return []

    def __rich__(self) -> RenderableType:
        title = Text.assemble((self.title, "bold"), "  ", (self._run, "dim"))
        body = Text("waiting for the first steps", style="dim") if self.record is None else self._body(self.record)
        return Panel(body, title=title, title_align="left", width=WIDTH)

    def _body(self, record: Record) -> RenderableType:
        facts = Table.grid(padding=(0, 2))
        for _ in range(2):
            facts.add_column(style="dim")
            facts.add_column(min_width=20)
        cells = self._facts(record)
        for first in range(0, len(cells), 2):
            facts.add_row(*(part for cell in cells[first : first + 2] for part in cell))
        lines: list[RenderableType] = [_progress(record), facts]
        if self._losses:
            lines.append(Text.assemble(("loss  ", "dim"), sparkline(self._losses)))
        shares = {name: record[f"time_{name}"] for name in PHASE_STYLES if f"time_{name}" in record}
        if shares:
            lines += _time_split(shares)
        return Group(*lines, *self._remarks(record))

    def _remarks(self, record: Record) -> list[Text]:
        """What not every run has: its cost, validations, restarts, checkpoints that failed."""
        lines = []
        if self._cost is not None:
            lines.append(Text.assemble(("cost  ", "dim"), self._cost["text"]))
        if self._validation is not None:
            metrics = self._validation["metrics"].items()
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics if not BUCKET.fullmatch(name))
            lines.append(Text.assemble((f"validation of step {self._validation['step']}  ", "dim"), values))
        if self._restarts:
            last = describe_restart(self._restarts[-1])
            lines.append(Text(f"restarts: {len(self._restarts)}, the last: {last}", "yellow"))
        if record.get("checkpoint_error") is not None:
            lines.append(Text(f"newest checkpoint failed: {record['checkpoint_error']}", "bold red"))
        return lines

    def _facts(self, record: Record) -> list[tuple[str, str]]:
        """Name and value of everything that the record has."""
        saved, workers, skipped = (record.get(key) for key in ("checkpoint_step", "world_size", "skipped_steps"))
        age = duration(record.get("seconds", 0.0) - self._saved_at)
        facts: list[tuple[str, str | None]] = [
            ("loss", _number(record, "loss", "{:.4f}")),
            ("images/s", _number(record, "images_per_second", "{:.1f}")),
            ("gradient norm", _number(record, "grad_norm", "{:.3g}")),
            ("samples", _number(record, "samples_seen", "{:,}")),
            ("learning rate", _number(record, "learning_rate", "{:.3g}")),
            ("MFU", _number(record, "mfu", "{:.1%}")),
            ("workers", None if workers is None else str(workers)),
            ("memory", None if record.get("memory_bytes") is None else f"{record['memory_bytes'] / 2**30:.2f} GiB"),
            ("saved", None if saved is None else f"step {saved}, {age} ago"),
            ("skipped steps", str(skipped) if skipped else None),
        ]
        return [(name, value) for name, value in facts if value is not None]


def describe(record: Record) -> str:
    """`step 40/500, loss 0.1234, 52.1 images/s, 73 s left`: of those, what the record has."""
    parts = [f"step {record['step']}/{record['max_steps']}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "images_per_second" in record:
        parts.append(f"{record['images_per_second']:.1f} images/s")
    if "eta_s" in record:
        parts.append(f"{record['eta_s']:.0f} s left")
    return ", ".join(parts)


def describe_restart(record: Record) -> str:
    """`restart (failure) from step 40 with 2 workers after 12 s: …`: of those, what the record has."""
    text = f"restart ({record.get('kind', 'failure')}) from step {record['step']}"
    if record.get("world_size") is not None:
        text += f" with {record['world_size']} workers"
    if record.get("seconds") is not None:
        text += f" after {record['seconds']:.0f} s"
    return f"{text}: {record.get('reason', 'unknown')}"


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """One block of eight heights for each value, from the least to the largest of them."""
    least, largest = min(values), max(values)
    span = largest - least or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - least) / span))] for value in values)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 7 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    if days < 2:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(days)} d {int(hours) % 24} h"


def _progress(record: Record) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    left = f"{duration(record['eta_s'])} left" if "eta_s" in record else ""
    row.add_row(
        f"{record['progress']:4.0%}",
        ProgressBar(total=1.0, completed=record["progress"], width=24),
        f"step {record['step']:,}/{record['max_steps']:,}",
        left,
    )
    return row


def _time_split(shares: dict[str, float]) -> list[RenderableType]:
    """One bar of `BAR_WIDTH` cells in which each share has its part, and what the colours mean."""
    bar = Text.assemble(("time  ", "dim"))
    ends, total = 0, 0.0
    for name, share in shares.items():
        total += share
        cells = round(BAR_WIDTH * min(total, 1.0)) - ends
        ends += cells
        bar.append("█" * cells, style=PHASE_STYLES[name])
    meanings = [Text.assemble(("■ ", PHASE_STYLES[name]), f"{name} {share:.0%}") for name, share in shares.items()]
    legend = Table.grid(padding=(0, 2))
    for first in range(0, len(meanings), 4):
        legend.add_row("    ", *meanings[first : first + 4])
    return [bar, legend]


def _number(record: Record, name: str, layout: str) -> str | None:
    value: Any = record.get(name)
    return None if value is None else layout.format(value)
