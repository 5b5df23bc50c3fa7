"""Makes pictures for a prompt, or for every line of a file, with a trained bundle; ends with a captioned grid."""

from __future__ import annotations

import sys

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.generation.requests import GenerateConfig
from unclip.generation.run import GenerationJob
from unclip.pipelines.bundle import BundleError


def main() -> int:
    arguments = parse_job(__doc__ or "", recipes={"default": GenerateConfig})
    try:
        job = GenerationJob.prepare(arguments.config)
        if arguments.dry_run:
            sizes = job.cascade.sizes.values()
            print(f"{len(job.requests)} pictures of up to {max(sizes)} px would be in {job.config.out}")
            return 0
        print(job.run())
    except (ConfigError, BundleError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
