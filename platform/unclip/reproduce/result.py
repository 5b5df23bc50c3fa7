"""What a reproduction says at its end: intervals and verdicts of every claim, as JSON, as lines and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from unclip.reproduce.findings import FINDINGS, Claim, Measured
from unclip.reproduce.statistics import paired_interval
from unclip.utils.html_page import HtmlPage

_HEADER = ("claim", "below", "above", "difference", "95% from", "to", "verdict")
_METRICS = {
    "frechet": "Fréchet distance",
    "clip_score": "CLIP-score",
    "cosine": "cosine to the true z_i",
    "diversity": "cosine distance within a caption",
}


def summarise(measured: Sequence[Measured]) -> dict[str, Any]:
    """`findings` with the verdict of every claim, from the metrics of each seed; JSON values."""
    return {
        "findings": [
            {
                "name": finding.name,
                "paper": finding.paper,
                "claims": [_decided(claim, measured) for claim in finding.claims],
            }
            for finding in FINDINGS
        ]
    }


def _decided(claim: Claim, measured: Sequence[Measured]) -> dict[str, Any]:
    below, above = ([side.value(seed) for seed in measured] for side in (claim.below, claim.above))
    interval = paired_interval([high - low for low, high in zip(below, above, strict=True)])
    return {
        "claim": claim.text,
        "below": below,
        "above": above,
        "difference": asdict(interval),
        "verdict": interval.verdict,
    }


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The findings as text, a line for each claim."""
    for finding in result["findings"]:
        yield f"{finding['name']}  (paper: {finding['paper']})"
        for row in _rows(finding):
            claim, below, above, difference, low, high, verdict = row
            yield (
                f"  {verdict:<12}  {claim}: {below:.4g} below {above:.4g}, "
                f"difference {difference:.4g} [{low:.4g}, {high:.4g}]"
            )


def report_page(result: Mapping[str, Any], mosaics: Mapping[str, bytes]) -> HtmlPage:
    """The findings, every metric that they were made of, and pictures of the same captions by every variant (PNG)."""
    page = HtmlPage("The paper's findings, at small scale")
    seeds = len(result["measured"])
    page.note(
        f"{seeds} seeds. A claim says that one number is below another; the difference is taken seed by seed, its 95% interval "
        "is Student's. It held where all of the interval is above 0, did not hold where all of it is below, and is else not "
        "decided. CLIP and data are the same for all seeds: the intervals say nothing of those."
    )
    for finding in result["findings"]:
        page.heading(finding["name"].capitalize())
        page.note(f"Paper: {finding['paper']}.")
        page.table(list(_rows(finding)), _HEADER)
    page.heading("All measurements: mean and standard deviation over seeds")
    page.table(list(_measurements(result["measured"])), ("", *_METRICS.values()))
    page.heading("Pictures of the first captions, seed 0")
    page.pictures([(content, "image/png", name.replace("_", " ")) for name, content in mosaics.items()])
    return page


def _rows(finding: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for claim in finding["claims"]:
        means = (float(np.mean(claim[side])) for side in ("below", "above"))
        yield claim["claim"], *means, *(claim["difference"][name] for name in ("mean", "low", "high")), claim["verdict"]


def _measurements(measured: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    for name in measured[0]:
        values = {metric: [seed[name].get(metric) for seed in measured] for metric in _METRICS}
        cells = (
            "" if None in of else f"{np.mean(of):.4g} ± {np.std(of, ddof=1):.2g}"  # type: ignore[arg-type]
            for of in values.values()
        )
        yield name.replace("_", " "), *cells
