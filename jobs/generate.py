"""Makes pictures for a prompt, or for every row of a list of any length, with a trained bundle; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.generate import run_generate
from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.generation.bulk.config import GenerateConfig


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": GenerateConfig}, argv)
    config: GenerateConfig = arguments.config
    return exit_status("generate", lambda: _generate(config, dry_run=arguments.dry_run), goes_on="with what is missing")


def _generate(config: GenerateConfig, *, dry_run: bool) -> None:
    facts = run_generate(config, dry_run=dry_run)
    if dry_run:
        print(
            "{prompts} prompts in {units} units would be made by {actors} actors".format(**facts) + f" in {config.out}"
        )
        return
    counts, submission = facts["counts"], facts.get("submission", {})
    print("{pictures} pictures of {done} prompts; {quarantined} prompts are quarantined".format(**counts))
    for reason, rows in counts["reasons"].items():
        print(f"  {reason}: {rows}")
    if submission:
        figures = (
            "{candidates} images in {seconds} s, {images_per_s} images/s, {gpu_hours} GPU-hours, {cpu_hours} CPU-hours"
        )
        print(figures.format(**submission))
        print(f"cost: {facts['cost']['text']}")
    if counts["pictures"]:
        print(f"{config.out}/grid.png")


if __name__ == "__main__":
    sys.exit(main())
