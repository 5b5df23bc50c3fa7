"""The paper's findings at small scale: trains every variant, measures them and says which held. Run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.jobs import exit_status
from unclip.cluster.lease import Lease
from unclip.config.cli import parse_job
from unclip.reproduce.config import RECIPES, ReproduceConfig
from unclip.reproduce.job import Reproduction
from unclip.reproduce.result import lines
from unclip.utils import storage
from unclip.utils.memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", RECIPES, argv)
    config: ReproduceConfig = arguments.config
    return exit_status(
        "reproduce", lambda: _reproduce(config, dry_run=arguments.dry_run), goes_on="with what is missing"
    )


def _reproduce(config: ReproduceConfig, *, dry_run: bool) -> None:
    job = Reproduction(config)
    left = [step for step in job.steps if not step.is_done]
    flops = sum(step.cost for step in left)
    if dry_run:
        print(f"{len(left)} of {len(job.steps)} steps, {flops / 1e12:.1f} TFLOP, would be done in {job.config.out}")
        return
    if job.device.type == "cpu":
        keep_freed_memory()
    with Lease(storage.join(job.config.out, "_driver.json"), f"out = {job.config.out!r}"):
        result = job.run()
    print("\n".join(lines(result)))
    print(storage.join(job.config.out, "report.html"))


if __name__ == "__main__":
    sys.exit(main())
