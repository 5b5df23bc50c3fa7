"""Draws a part of a picture anew (`repaint` or `keep`, a mask), or continues it beyond its border (`canvas`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.generation.jobs import run_job
from unclip.generation.manipulations import EditConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("edit", __doc__, EditConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
