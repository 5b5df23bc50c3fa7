"""Judges pictures, a prior or an upsampler by held-out records and the features of networks; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.evaluation.config import (
    EvaluateConfig,
    EvaluatePicturesConfig,
    EvaluatePriorConfig,
    EvaluateUpsamplerConfig,
)

RECIPES: Mapping[str, Callable[[], EvaluateConfig]] = {
    "pictures": EvaluatePicturesConfig,
    "prior": EvaluatePriorConfig,
    "upsampler": EvaluateUpsamplerConfig,
}
"""What is judged."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", RECIPES, argv)
    config = arguments.config
    return exit_status("evaluate", lambda: _evaluate(config, dry_run=arguments.dry_run), goes_on="with what is missing")


def _evaluate(config: EvaluateConfig, *, dry_run: bool) -> None:
    result = run_evaluate(config, dry_run=dry_run)
    judged = next(name for name in ("pictures", "records") if name in result)
    against = f" against {result['reference']}" if result.get("reference") else ""
    if dry_run:
        print(f"{result[judged]} {judged} would be judged{against}, in {config.out}")
        return
    print(f"{result[judged]} {judged}{against}")
    for name, metrics in result["metrics"].items():
        if metrics is not None:
            print(
                f"  {name}: " + ", ".join(f"{key} {value:.6g}" for key, value in metrics.items() if value is not None)
            )
    print(f"{config.out}/report.html")


if __name__ == "__main__":
    sys.exit(main())
