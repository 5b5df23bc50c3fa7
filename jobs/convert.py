"""Converts models of other libraries to bundles, and bundles to diffusers' folders; every tensor is accounted for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.interop.convert import ConvertConfig, run_convert
from unclip.interop.keys import InteropError
from unclip.pipelines.bundle import BundleError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": ConvertConfig}, argv)
    try:
        for account in run_convert(arguments.config, dry_run=arguments.dry_run):
            print("\n".join(account.lines()), flush=True)
    except (InteropError, ConfigError, BundleError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.config.out} {'would be made' if arguments.dry_run else 'is made'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
