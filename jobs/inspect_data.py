"""Writes one self-contained HTML report about a folder of records: `python jobs/inspect_data.py --set data=FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.inspection import InspectConfig, inspect
from unclip.data.manifest import DataError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": InspectConfig}, argv)
    try:
        facts = inspect(arguments.config, dry_run=arguments.dry_run)
    except (ConfigError, DataError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    verb = "would be shown" if arguments.dry_run else "are shown"
    print(f"{facts['sample']} of {facts['rows']} records {verb} in {facts['out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
