"""Draws captions without image embedding, with the text's in its place, and with the prior's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import AblatePriorConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ablate_prior", __doc__, AblatePriorConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
