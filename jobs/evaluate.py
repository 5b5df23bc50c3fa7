"""Judges pictures against reference pictures and against their captions, by CLIP's features; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.evaluation.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": EvaluateConfig}, argv)
    config: EvaluateConfig = arguments.config
    return exit_status("evaluate", lambda: _evaluate(config, dry_run=arguments.dry_run), goes_on="with what is missing")


def _evaluate(config: EvaluateConfig, *, dry_run: bool) -> None:
    result = run_evaluate(config, dry_run=dry_run)
    against = f" against {result['reference']}" if result["reference"] else ""
    if dry_run:
        print(f"{result['pictures']} pictures would be judged{against}, in {config.out}")
        return
    print(f"{result['pictures']} pictures{against}")
    for name, metrics in result["metrics"].items():
        if metrics is not None:
            print(
                f"  {name}: " + ", ".join(f"{key} {value:.6g}" for key, value in metrics.items() if value is not None)
            )
    print(f"{config.out}/report.html")


if __name__ == "__main__":
    sys.exit(main())
