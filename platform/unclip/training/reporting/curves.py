"""The curves of one or several runs in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from unclip.training.reporting.run_tail import Record
from unclip.training.reporting.view import BUCKET
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

COLUMNS = 3
SMOOTHED_SHARE = 0.05
"""Share of a curve's points over which it is smoothed."""
PHASE_COLORS = {
    "data": "tab:red",
    "forward": "cornflowerblue",
    "backward": "tab:blue",
    "optimizer": "tab:cyan",
    "checkpoint": "gold",
    "log": "tab:purple",
    "other": "silver",
}
"""As on the terminal."""


@dataclass(frozen=True)
class Curves:
    """What a run folder has to draw, each by step."""

    name: str
    color: str
    records: list[dict[str, Any]]
    validations: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, run: RunFolder, name: str, color: str) -> Curves:
        return cls(
            name,
            color,
            records=run.metrics(),
            validations=sorted(run.lines(run.validation_uri), key=lambda record: record["step"]),
            restarts=[record["step"] for record in run.lines(run.restarts_uri)],
            skipped=[record["step"] for record in run.skipped()],
        )

    def metric(self, name: str, scale: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and finite values of a metric, times `scale`, where the records have it."""
        return _points(self.records, lambda record: record.get(name), scale)

    def validation(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _points(self.validations, lambda record: record["metrics"].get(name), 1.0)


Draw = Callable[[Axes, Sequence[Curves]], None]

_METRICS = (
    ("loss", "loss", 1.0),
    ("gradient norm", "grad_norm", 1.0),
    ("learning rate", "learning_rate", 1.0),
    ("images/s", "images_per_second", 1.0),
    ("memory of a worker, GiB", "memory_bytes", 2.0**-30),
    ("model FLOPs of peak, %", "mfu", 100.0),
)


def draw_curves(runs: Sequence[RunFolder], out: str) -> bool:
    """Writes a PNG to `out`, local or `s3://`; False where there is nothing to draw yet.

    One panel for each thing that is known of any of the runs, over steps; raw values are faint where a smoothed curve is
    drawn over them. Dashed lines are restarts, ticks at the bottom steps without a finite gradient. Of each run there is a
    panel with the split of its time.
    """
    colors = mpl.color_sequences["tab10"]
    names = _names([run.uri for run in runs])
    drawn = [Curves.read(run, names[i], mpl.colors.to_hex(colors[i % len(colors)])) for i, run in enumerate(runs)]
    drawn = [curves for curves in drawn if curves.records]
    if not drawn:
        return False
    buffer = io.BytesIO()
    figure_of(drawn).savefig(buffer, format="png", dpi=100)
    storage.write_bytes(out, buffer.getvalue())
    return True


def figure_of(drawn: Sequence[Curves]) -> Figure:
    """The panels that there is something for, and one legend; at least one of the runs has a record."""
    panels = _panels(drawn)
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for (title, draw), axes in zip(panels, grid, strict=False):
        draw(axes, drawn)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    keys: list[Artist] = [Line2D([], [], color=curves.color, label=curves.name) for curves in drawn]
    keys += [Patch(color=color, label=phase) for phase, color in PHASE_COLORS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=10, fontsize=8, frameon=False)
    return figure


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) -> (n,): the mean over a window around each value, which is shorter at the ends; a constant stays itself."""
    reach = max(1, round(SMOOTHED_SHARE * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _panels(drawn: Sequence[Curves]) -> list[tuple[str, Draw]]:
    panels: list[tuple[str, Draw]] = [
        (title, partial(_draw_metric, name=name, scale=scale))
        for title, name, scale in _METRICS
        if any(len(curves.metric(name)[0]) for curves in drawn)
    ]
    for curves in drawn:
        if any(f"time_{phase}" in record for record in curves.records for phase in PHASE_COLORS):
            panels.append((f"time of {curves.name}, %", partial(_draw_time, of=curves)))
    names = dict.fromkeys(name for curves in drawn for record in curves.validations for name in record["metrics"])
    by_step = [name for name in names if not BUCKET.fullmatch(name)]
    by_timestep = dict.fromkeys(found[1] for name in names if (found := BUCKET.fullmatch(name)))
    panels += [(f"validation: {name}", partial(_draw_validation, name=name)) for name in by_step]
    panels += [(f"last validation: {name} by timestep", partial(_draw_buckets, name=name)) for name in by_timestep]
    return panels


def _draw_metric(axes: Axes, drawn: Sequence[Curves], *, name: str, scale: float) -> None:
    lowest, highest = math.inf, 0.0
    for curves in drawn:
        steps, values = curves.metric(name, scale)
        if len(values) >= 20 and name in ("loss", "grad_norm", "images_per_second"):
            axes.plot(steps, values, color=curves.color, alpha=0.25, linewidth=0.8)
            values = smoothed(values)
        axes.plot(steps, values, color=curves.color, linewidth=1.5)
        lowest, highest = min([lowest, *values]), max([highest, *values])
        _mark(axes, curves)
    if name in ("loss", "grad_norm") and lowest > 0 and highest > 10 * lowest:
        axes.set_yscale("log")
    elif name not in ("loss", "grad_norm"):
        axes.set_ylim(0.0, 1.1 * highest or 1.0)


def _draw_time(axes: Axes, _: Sequence[Curves], *, of: Curves) -> None:
    records = [record for record in of.records if "time_other" in record]
    steps = [record["step"] for record in records]
    shares = [[100 * record.get(f"time_{phase}", 0.0) for record in records] for phase in PHASE_COLORS]
    axes.stackplot(steps, shares, colors=list(PHASE_COLORS.values()), step="mid")
    axes.set_ylim(0, 100)
    _mark(axes, of)


def _draw_validation(axes: Axes, drawn: Sequence[Curves], *, name: str) -> None:
    for curves in drawn:
        axes.plot(*curves.validation(name), color=curves.color, marker="o", markersize=3, linewidth=1.2)
        _mark(axes, curves)


def _draw_buckets(axes: Axes, drawn: Sequence[Curves], *, name: str) -> None:
    """The first validation is faint."""
    for curves in drawn:
        done = [record["metrics"] for record in curves.validations if name in record["metrics"]]
        for metrics, alpha in zip((done[:1] + done[-1:])[-2:], (0.3, 1.0), strict=False):
            buckets = [(found, value) for key, value in metrics.items() if (found := BUCKET.fullmatch(key))]
            of_name = [((int(found[2]) + int(found[3])) / 2, value) for found, value in buckets if found[1] == name]
            axes.plot(*zip(*of_name, strict=True), "o-", color=curves.color, alpha=alpha, markersize=3, linewidth=1.2)


def _mark(axes: Axes, curves: Curves) -> None:
    for step in curves.restarts:
        axes.axvline(step, color=curves.color, linestyle="--", linewidth=0.8, alpha=0.7)
    if curves.skipped:  # a line of nothing that is not clipped has no place, for which the layout would look
        bottom = [0.0] * len(curves.skipped)
        at_bottom = axes.get_xaxis_transform()
        axes.plot(curves.skipped, bottom, "|", color=curves.color, markersize=10, clip_on=False, transform=at_bottom)


def _points(
    records: Sequence[Record], value_of: Callable[[Record], Any], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = [(record["step"], value_of(record)) for record in records]
    found = [(step, scale * value) for step, value in pairs if value is not None and math.isfinite(value)]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _names(uris: Sequence[str]) -> list[str]:
    """What the runs are called: as few last parts of their addresses as tell them apart."""
    for parts in range(1, max(uri.count("/") for uri in uris) + 2):
        names = ["/".join(uri.rsplit("/", parts)[-parts:]) for uri in uris]
        if len(set(names)) == len(set(uris)):
            return names
    return list(uris)
