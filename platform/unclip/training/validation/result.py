"""What a validation finds: numbers, and pictures to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]

_PIXELS_AT_ONCE = 1024 * 1024


@dataclass(frozen=True)
class SampleGrid:
    """Pictures uint8 (H, W, 3) in rows that have a caption each, under `titles`; what a row lacks is None."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture | None, ...]], ...]


@dataclass(frozen=True)
class Validation:
    """Of one checkpoint: its metrics by name, and the sample grid where the stage has one."""

    metrics: dict[str, float]
    grid: SampleGrid | None = None


def parts(count: int, side: int) -> Iterator[slice]:
    """Pieces of `count` pictures of `side` pixels that may be sampled at once: a bound on memory."""
    size = max(1, _PIXELS_AT_ONCE // side**2)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
