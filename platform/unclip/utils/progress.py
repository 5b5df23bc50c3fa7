"""The progress bar of long work."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, unit: str, *, done: int = 0, title: str = "") -> tqdm[Any]:
    """A bar over `total` units on stderr; in a log file, where it cannot be redrawn, a line every ten seconds at most."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=done, unit=unit, desc=title or None, mininterval=interval, smoothing=0.1)
