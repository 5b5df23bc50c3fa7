"""Makes variations of pictures: `pictures=[cat.png]`; what CLIP knows of each stays."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import VariationsConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("variations", __doc__, VariationsConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
