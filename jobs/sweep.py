"""Makes and judges the same prompts at every point of a grid of guidance scales and steps; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.jobs import exit_status
from unclip.cluster.sweep import SweepConfig, run_sweep
from unclip.config.cli import parse_job
from unclip.evaluation.sweep_page import title_of


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": SweepConfig}, argv)
    config: SweepConfig = arguments.config
    return exit_status("sweep", lambda: _sweep(config, dry_run=arguments.dry_run), goes_on="with what is missing")


def _sweep(config: SweepConfig, *, dry_run: bool) -> None:
    result = run_sweep(config, dry_run=dry_run)
    if dry_run:
        print(f"{result['points']} points of {result['prompts']} prompts would be made and judged, in {config.out}")
        return
    for point in result["points"]:
        metrics, score = point["metrics"], point["metrics"]["clip_score"]
        distance = metrics["clip"].get("frechet_distance")
        figures = [f"FD-CLIP {distance:.6g}"] if distance is not None else []
        figures += [f"CLIP-score {score['mean']:.6g}"] if score is not None else []
        print(f"{title_of(point['settings'])}: {', '.join(figures)}")
    print(f"{config.out}/report.html")


if __name__ == "__main__":
    sys.exit(main())
