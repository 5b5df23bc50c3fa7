"""Asks a run for a profile of its next steps: `python jobs/profile_run.py RUN [--steps 5]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_flags
from unclip.training.profiling import ProfileConfig, request_profile


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", ProfileConfig, argv, positional="run")
    try:
        profiles = request_profile(config)
    except (ConfigError, OSError) as error:
        print(f"profile_run: {error}", file=sys.stderr)
        return 2
    print(f"asked for {config.steps} steps; traces will be in {profiles}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
