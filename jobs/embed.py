"""Adds frozen CLIP embeddings to a folder of records; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.jobs import REFUSALS, REFUSED
from unclip.config.cli import parse_job


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": EmbedConfig}, argv)
    try:
        facts = run_embed(arguments.config, dry_run=arguments.dry_run)
    except REFUSALS as error:
        print(f"embed: {error}", file=sys.stderr)
        return REFUSED
    verb = "would be" if arguments.dry_run else "are"
    print(
        f"{facts['rows']} records {verb} embedded in {arguments.config.out}, CLIP {facts['clip']['fingerprint'][:12]}…"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
