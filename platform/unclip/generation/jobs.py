"""What the scripts of manipulations do with their command lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.generation.manipulate import ManipulationJob
from unclip.generation.manipulations import ManipulationConfig
from unclip.pipelines.bundle import BundleError

REFUSALS = (ConfigError, DataError, BundleError, OSError)
"""What tells a user that something is wrong with what was asked for; anything else is a fault of ours."""
REFUSED = 2
"""Exit status of those."""


def run_job(
    name: str, description: str | None, config: type[ManipulationConfig], argv: Sequence[str] | None = None
) -> int:
    """Makes a manipulation's pictures as the command line says; the exit status, 0 only when their sheet is there."""
    arguments = parse_job(description or "", {"default": config}, argv)
    try:
        job = ManipulationJob.prepare(arguments.config)
        if job.is_finished:
            print(f"{name}: finished before, and kept as it is", file=sys.stderr)
        elif arguments.dry_run:
            print(f"pictures of up to {max(job.cascade.sizes.values())} px would be in {arguments.config.out}")
            return 0
        print(job.run())
    except REFUSALS as error:
        print(f"{name}: {error}", file=sys.stderr)
        return REFUSED
    return 0
