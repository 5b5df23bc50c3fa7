"""The page of a sweep: how the metrics go with guidance and steps, and the same prompts at every point."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unclip.evaluation.thumbnails import thumbnail
from unclip.utils.html_page import HtmlPage

COLUMNS = 3
CLIP_SCORE = "clip_score.mean"
FRECHET_DISTANCE = "frechet_distance"
_DRAWN = (FRECHET_DISTANCE, "cmmd", "kernel_distance", "inception_score", "precision", "recall", "diversity")
"""Metrics that are drawn of each network's features; all are in the table."""
_ALSO_DRAWN = (CLIP_SCORE, "attribute_all.mean", "training.near_share")


@dataclass(frozen=True)
class SweepPoint:
    """What one setting came to.

    Args:
        settings: the value of each axis, by its name; those of one sweep have the same axes.
        metrics: numbers by dotted names, as `clip.frechet_distance`.
        pictures: encoded, by prompt: those that are shown.
    """

    settings: Mapping[str, float]
    metrics: Mapping[str, float]
    pictures: Mapping[str, bytes]

    @property
    def title(self) -> str:
        return title_of(self.settings)


def title_of(settings: Mapping[str, float]) -> str:
    """`decoder.guidance_scale 1.5, decoder.num_inference_steps 15`."""
    return ", ".join(f"{axis} {value:g}" for axis, value in settings.items())


def numbers(metrics: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Every number of an evaluation's metrics by its dotted name."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{path}{name}"] = value
    return found


def sweep_page(title: str, points: Sequence[SweepPoint]) -> HtmlPage:
    """The whole page; the points in the order of their columns."""
    page = HtmlPage(title)
    page.heading("Curves")
    page.note("First the distance against CLIP-score, along guidance where that was swept; then each metric by itself.")
    buffer = io.BytesIO()
    figure_of(points).savefig(buffer, format="png", dpi=100)
    page.picture(buffer.getvalue(), "image/png", "curves of the metrics")
    page.heading("All points")
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    rows = [[name, *(point.metrics.get(name, "–") for point in points)] for name in names]
    page.table(rows, ("", *(point.title for point in points)))
    prompts = list(dict.fromkeys(prompt for point in points for prompt in point.pictures))
    if prompts:
        page.heading("The same prompts and seeds at every point")
        cells = [[point.pictures.get(prompt) for point in points] for prompt in prompts]
        page.grid(
            [point.title for point in points],
            [
                (prompt, [None if image is None else (thumbnail(image), "image/jpeg", "") for image in row])
                for prompt, row in zip(prompts, cells, strict=True)
            ],
        )
    return page


def figure_of(points: Sequence[SweepPoint]) -> Figure:
    """The curves: a line for each combination of what else was swept."""
    panels = list(_panels(points))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    explained: list[str] = []
    for (x, y, along), axes in zip(panels, grid, strict=False):
        drawn = lines(points, x, y, along)
        _draw(axes, drawn, x, y)
        if len(drawn) > 1 and list(drawn) != explained:  # once for all panels that follow with the same lines
            axes.legend(fontsize=6)
            explained = list(drawn)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    return figure


Line = list[tuple[float, float, float]]
"""(x, y, value of the axis that it goes along) of its points, in the order of that value."""


def lines(points: Sequence[SweepPoint], x: str, y: str, along: str) -> dict[str, Line]:
    """A line along an axis for each combination of the others' values, by what that is; points that lack a number left out.

    Args:
        x, y: names of metrics or of axes.
    """
    found: dict[str, Line] = {}
    for point in sorted(points, key=lambda point: point.settings[along]):
        known = {**point.metrics, **point.settings}
        if x in known and y in known:
            others = {axis: value for axis, value in point.settings.items() if axis != along}
            found.setdefault(title_of(others), []).append((known[x], known[y], point.settings[along]))
    return found


def _panels(points: Sequence[SweepPoint]) -> Iterator[tuple[str, str, str]]:
    """(x, y, the axis along which lines go): what there is to draw."""
    axes = list(points[0].settings)
    there = dict.fromkeys(name for point in points for name in point.metrics)
    drawn = [name for name in there if name.rpartition(".")[2] in _DRAWN or name in _ALSO_DRAWN]
    if CLIP_SCORE in there:
        distances = [name for name in drawn if name.endswith(FRECHET_DISTANCE)]
        yield from ((CLIP_SCORE, distance, axes[0]) for distance in distances)
    yield from ((axis, name, axis) for axis in axes for name in drawn)


def _draw(axes: Axes, drawn: Mapping[str, Line], x: str, y: str) -> None:
    colors = mpl.color_sequences["tab10"]
    for number, (label, line) in enumerate(drawn.items()):
        xs, ys, values = zip(*line, strict=True)
        axes.plot(xs, ys, "o-", color=colors[number % len(colors)], label=label, markersize=3, linewidth=1.2)
        if x == CLIP_SCORE:
            for point in zip(xs, ys, values, strict=True):
                axes.annotate(f"{point[2]:g}", point[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel(x, fontsize=8)
    axes.set_title(y, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
