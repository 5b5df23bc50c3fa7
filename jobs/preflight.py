"""Is this cluster fit for a large run, and what is to be mended? Checks every node, and says what it finds as it goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from unclip.cluster.checkup.config import CheckupConfig
from unclip.cluster.checkup.result import lines
from unclip.cluster.checkup.run import run_checkup, settle
from unclip.cluster.failures import RunFailed
from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.recipes import RECIPES

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": CheckupConfig}, argv)
    config: CheckupConfig = arguments.config
    return exit_status("preflight", lambda: _check_up(config, dry_run=arguments.dry_run), goes_on="from the beginning")


def _check_up(config: CheckupConfig, *, dry_run: bool) -> None:
    config = settle(config, RECIPES, ROOT)
    if dry_run:
        print(f"would check {', '.join(config.checks)} with {config.storage}")
        return
    unfit = []
    for results in run_checkup(config, RECIPES):
        print("\n".join(lines(results)), flush=True)
        unfit += sorted({result.check for result in results if result.status == "failed"})
    if unfit:
        raise RunFailed(f"{len(unfit)} of {len(config.checks)} checks failed: {', '.join(unfit)}")
    print(f"fit: none of {len(config.checks)} checks failed")


if __name__ == "__main__":
    sys.exit(main())
