"""Turns pictures and captions from anywhere into training-ready shards; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from unclip.cluster.ingest import IngestConfig, run_ingest
from unclip.cluster.jobs import REFUSALS, REFUSED
from unclip.config.cli import parse_job

NOTHING_KEPT = 1


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": IngestConfig}, argv)
    try:
        facts = run_ingest(arguments.config, dry_run=arguments.dry_run)
    except REFUSALS as error:
        print(f"ingest: {error}", file=sys.stderr)
        return REFUSED
    if arguments.dry_run:
        print("\n".join(facts["parts"]))
        print(f"{len(facts['parts'])} parts; columns: {', '.join(facts['columns'])}")
        return 0
    print(counts_table(facts["counts"]))
    print(f"{len(facts['shards'])} shards in {arguments.config.out}")
    if not facts["rows"]:
        print("ingest: no row was kept; the quarantine says why", file=sys.stderr)
        return NOTHING_KEPT
    return 0


def counts_table(counts: dict[str, Any]) -> str:
    """What became of the rows, one number a line; the first is the sum of the others."""
    lines = {"rows in": counts["rows_in"], "kept": counts["kept"]}
    lines |= {f"quarantined: {reason}": rows for reason, rows in counts["quarantined"].items()}
    lines |= {"duplicates": counts["duplicates"], "near duplicates": counts["near_duplicates"]}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {rows:>12,}" for name, rows in lines.items())


if __name__ == "__main__":
    sys.exit(main())
