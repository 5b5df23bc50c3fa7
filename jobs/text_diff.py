"""Changes pictures from one caption towards another: `source="a photo of a cat"`, `target="a photo of a tiger"`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import TextDiffConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("text_diff", __doc__, TextDiffConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
