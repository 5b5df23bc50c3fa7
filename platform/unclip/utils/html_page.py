"""Reports as one HTML file that needs nothing else: tables, histograms drawn as SVG, pictures inside the file.

All text is escaped; nothing on the page is loaded from anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Figure = tuple[bytes, str, str]
"""(encoded picture, its media type as `image/jpeg`, the text below it)."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d24; --soft: #6b6b78; --line: #dcdce4; --page: #ffffff; --bar: #4863a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ee; --soft: #9a9aa8; --line: #3a3a44; --page: #17171c; --bar: #8aa4e0; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1080px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
p.note, figcaption, svg text { color: var(--soft); fill: var(--soft); font-size: 12px; }
table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; width: 128px; }
figure img { width: 128px; height: 128px; object-fit: contain; border: 1px solid var(--line); }
figcaption { overflow-wrap: anywhere; max-height: 9em; overflow: hidden; }
img.wide { max-width: 100%; }
.grid { overflow-x: auto; } .grid td { max-width: 260px; font-size: 12px; overflow-wrap: anywhere; }
.grid td:first-child { min-width: 110px; }
.grid img { object-fit: contain; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
.plots { display: flex; flex-wrap: wrap; gap: 24px; } rect { fill: var(--bar); } line { stroke: var(--line); }
"""
_WIDTH, _HEIGHT, _BOTTOM = 330, 150, 34


class HtmlPage:
    """A page that is filled from top to bottom; `html()` is the whole file."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Starts a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        """A small paragraph."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def table(self, rows: Sequence[Sequence[str | int | float]], header: Sequence[str] = ()) -> None:
        """A table; numbers are right-aligned and grouped by thousands."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
        self._parts.append(f"<table>{f'<tr>{head}</tr>' if header else ''}{body}</table>")

    def histograms(self, plots: Sequence[tuple[str, npt.NDArray[np.float64]]]) -> None:
        """One histogram beside the other, each (title, values); not finite values are left out and counted below it."""
        self._parts.append(f'<div class="plots">{"".join(histogram_svg(*plot) for plot in plots)}</div>')

    def pictures(self, figures: Sequence[Figure]) -> None:
        """Pictures in rows, each with its text."""
        cells = "".join(
            f'<figure><img alt="{escape(text, quote=True)}" src="{_data_uri(content, media)}">'
            f"<figcaption>{escape(text)}</figcaption></figure>"
            for content, media, text in figures
        )
        self._parts.append(f'<div class="pictures">{cells}</div>')

    def grid(
        self, titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Figure | None]]], *, side: int = 128
    ) -> None:
        """A row of pictures for each (text, figures), under `titles`; what a row lacks is None.

        Args:
            side: of each picture on the page, in pixels; small ones are enlarged pixel by pixel.
        """
        head = "".join(f"<th>{escape(title)}</th>" for title in titles)
        body = "".join(
            f"<tr><td>{escape(text)}</td>{''.join(_grid_cell(figure, side) for figure in figures)}</tr>"
            for text, figures in rows
        )
        self._parts.append(f'<div class="grid"><table><tr><th></th>{head}</tr>{body}</table></div>')

    def picture(self, content: bytes, media: str, text: str) -> None:
        """One encoded picture as wide as it is, at most as the page; `text` stands for it where it cannot be seen."""
        self._parts.append(f'<img class="wide" alt="{escape(text, quote=True)}" src="{_data_uri(content, media)}">')

    def html(self) -> str:
        """The file's content."""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self._title)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(self._parts)}</body></html>\n"
        )


def histogram_svg(title: str, values: npt.NDArray[np.float64], bins: int = 30) -> str:
    """A histogram between the 0.5th and the 99.5th percentile, with median and count written below it."""
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    if not len(finite):
        return f"<figure><figcaption>{escape(title)}: no values</figcaption></figure>"
    low, median, high = (float(value) for value in np.percentile(finite, [0.5, 50, 99.5]))
    finite = np.clip(finite, low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all the same: one bar, between zero and twice the value
        low, high = sorted((0.0, low + high or 1.0))
    counts, edges = np.histogram(finite, bins, range=(low, high))
    step, top = _WIDTH / bins, _HEIGHT - _BOTTOM
    heights = top * counts / counts.max()
    bars = "".join(
        f'<rect x="{index * step:.1f}" y="{top - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}">'
        f"<title>{_number(edges[index])} to {_number(edges[index + 1])}: {counts[index]:,}</title></rect>"
        for index, height in enumerate(heights)
    )
    facts = f"median {_number(median)}, {len(finite):,} values" + (f", {lost:,} without a number" if lost else "")
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 18}" viewBox="0 -18 {_WIDTH} {_HEIGHT + 18}" role="img">'
        f'<text x="0" y="-6">{escape(title)}</text>{bars}<line x1="0" x2="{_WIDTH}" y1="{top}" y2="{top}"/>'
        f'<text x="0" y="{top + 14}">{_number(edges[0])}</text>'
        f'<text x="{_WIDTH}" y="{top + 14}" text-anchor="end">{_number(edges[-1])}</text>'
        f'<text x="0" y="{top + 30}">{escape(facts)}</text></svg>'
    )


def _grid_cell(figure: Figure | None, side: int) -> str:
    if figure is None:
        return "<td></td>"
    content, media, text = figure
    image = f'<img alt="{escape(text, quote=True)}" width="{side}" height="{side}" src="{_data_uri(content, media)}">'
    return f"<td>{image}{escape(text)}</td>"


def _data_uri(content: bytes, media: str) -> str:
    return f"data:{escape(media, quote=True)};base64,{base64.b64encode(content).decode()}"


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{_number(value)}</td>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
