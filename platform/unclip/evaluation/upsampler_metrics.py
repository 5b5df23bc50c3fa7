"""How near an upsampler's pictures are to the real ones, against plain interpolation of what it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from unclip.evaluation.caption_scores import mean_and_interval

INTERPOLATED = "_interpolated"
"""Behind a column's name: the same of the interpolated pictures."""


def upsampler_metrics(
    columns: Mapping[str, npt.NDArray[np.float64]], *, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """By the name of the number, as JSON values: `mean`, `low` and `high` (95% interval over pictures), the same of plain
    interpolation (`interpolated…`) and of the difference of the two on each picture (`difference…`).

    Args:
        columns: (N,) of each number, and again under its name with `INTERPOLATED` behind it.
    """
    found = {}
    for name, values in columns.items():
        if name.endswith(INTERPOLATED):
            continue
        smooth = columns[name + INTERPOLATED]
        found[name] = {
            f"{prefix}{key}": value
            for prefix, numbers in (("", values), ("interpolated_", smooth), ("difference_", values - smooth))
            for key, value in _over_pictures(numbers, resamples=resamples, seed=seed)
        }
    return found


def _over_pictures(values: npt.NDArray[np.float64], *, resamples: int, seed: int) -> Iterator[tuple[str, float]]:
    each = [str(row) for row in range(len(values))]
    yield from mean_and_interval(values, each, resamples=resamples, seed=seed).items()
