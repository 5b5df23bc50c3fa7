"""Draws pictures from growing numbers of the principal components of their CLIP embeddings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.generation.manipulate import ManipulationJob
from unclip.generation.manipulations import ProbeConfig
from unclip.pipelines.bundle import BundleError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": ProbeConfig}, argv)
    try:
        job = ManipulationJob.prepare(arguments.config)
        if arguments.dry_run:
            print(f"pictures of up to {max(job.cascade.sizes.values())} px would be in {arguments.config.out}")
            return 0
        print(job.run())
    except (ConfigError, DataError, BundleError, OSError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
