"""Draws pictures from growing numbers of the principal components of their CLIP embeddings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import ProbeConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("probe", __doc__, ProbeConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
