"""Adds frozen CLIP embeddings to a folder of records, with their statistics; run it again to continue."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.jobs import REFUSALS, REFUSED
from unclip.config.cli import parse_job


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": EmbedConfig}, argv)
    config = arguments.config
    try:
        facts = run_embed(config, dry_run=arguments.dry_run)
    except REFUSALS as error:
        print(f"embed: {error}", file=sys.stderr)
        return REFUSED
    fingerprint = facts["clip"]["fingerprint"][:12]
    if arguments.dry_run:
        print(f"{facts['rows']} records would be embedded in {config.out}, CLIP {fingerprint}…")
        return 0
    pca = facts["pca"]
    print(
        f"{facts['rows']} records are embedded in {config.out}, CLIP {fingerprint}…; {pca['file']}: {pca['components']} "
        f"principal components, of which the first {pca['components_for_1_percent_error']} leave 1% of the variance"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
