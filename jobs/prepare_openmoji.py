"""Renders OpenMoji into training records: `python jobs/prepare_openmoji.py --set out=data/openmoji`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.cli import parse_job
from unclip.data.openmoji import PrepareConfig, prepare
from unclip.utils import storage


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job("Renders OpenMoji into training records.", {"default": PrepareConfig}, argv)
    config = arguments.config
    try:
        report = prepare(config, dry_run=arguments.dry_run)
    except OSError as error:
        print(f"prepare_openmoji: out: {error}", file=sys.stderr)
        return 1
    print(f"{report['drawings']} drawings in OpenMoji")
    for reason, count in report["left_out"].items():
        print(f"  {count:5d} left out: {reason}")
    for split, count in report["splits"].items():
        print(f"  {count:5d} {split}")
    made = "would be made" if arguments.dry_run else "made"
    for name, rows in report["rows"].items():
        state = "kept as it is" if name in report["kept"] else made
        print(f"{storage.join(config.out, name)}: {rows} records, {state}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
