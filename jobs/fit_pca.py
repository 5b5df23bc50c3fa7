"""Finds the principal components of image embeddings, which the autoregressive prior predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.data.pca import FitPcaConfig, fit_pca


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": FitPcaConfig}, argv)
    try:
        out, basis = fit_pca(arguments.config, dry_run=arguments.dry_run)
    except (ConfigError, DataError, OSError) as error:
        print(f"fit_pca: {error}", file=sys.stderr)
        return 2
    verb = "would be" if arguments.dry_run else "are"
    print(f"{basis.num_components} components of embeddings of {basis.embed_dim} numbers {verb} in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
