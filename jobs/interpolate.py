"""Makes pictures on the way from one picture to the next: `pictures=[cat.png,dog.png]`, two or more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import InterpolateConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("interpolate", __doc__, InterpolateConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
