"""Trains a judge of attributes, which says whether pictures show what their captions say; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.evaluation.judge.config import TrainJudgeConfig
from unclip.evaluation.judge.job import train_judge


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": TrainJudgeConfig}, argv)
    config = arguments.config
    return exit_status(
        "train_judge", lambda: _train(config, dry_run=arguments.dry_run), goes_on="with the networks that are missing"
    )


def _train(config: TrainJudgeConfig, *, dry_run: bool) -> None:
    found = train_judge(config, dry_run=dry_run)
    classes = ", ".join(f"{name} {len(values)}" for name, values in found["classes"].items())
    print(f"{found['pictures']} pictures; classes: {classes}")
    if dry_run:
        print(f"{config.folds} networks would be trained, in {config.out}")
        return
    for name, values in found["not_judged"].items():
        print(f"  {name}: not judged, too few drawings: {', '.join(values)}")
    for name, shares in found["accuracy"].items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in shares.items()))
    print(config.out)


if __name__ == "__main__":
    sys.exit(main())
