"""What a column of class labels holds; labels are compared as text, whatever the column's type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import pyarrow as pa

from unclip.data.manifest import DataError, Manifest, read_slices

CHECKED_ROWS = 1_000_000
"""Rows whose labels are read before a run starts; those behind them are checked as they are trained on."""


def distinct_labels(manifest: Manifest, column: str, *, at_most: int) -> tuple[str, ...]:
    """All values of `column` as text, sorted. Reads that column of every file.

    Raises `DataError` naming the column where a row has no value, or there are more than `at_most` different ones.
    """
    found: set[str] = set()
    for values in _values_by_file(manifest, column):
        found |= _distinct(manifest, column, values)
        if len(found) > at_most:
            raise DataError(
                f"data folder {manifest.uri!r}: column {column!r} holds more than {at_most} different values; "
                "that is no column of classes"
            )
    return tuple(sorted(found))


def check_labels(manifest: Manifest, column: str, classes: Sequence[str]) -> None:
    """Raises `DataError` naming column and value where one of the first `CHECKED_ROWS` labels is none of `classes`."""
    rows = 0
    for values in _values_by_file(manifest, column):
        unknown = sorted(_distinct(manifest, column, values) - set(classes))
        if unknown:
            raise DataError(
                f"data folder {manifest.uri!r}: column {column!r} holds {unknown[0]!r}, "
                f"which is none of the {len(classes)} classes"
            )
        rows += len(values)
        if rows >= CHECKED_ROWS:
            return


def _values_by_file(manifest: Manifest, column: str) -> Iterator[pa.ChunkedArray]:
    for _, fragments in groupby(enumerate(manifest.fragments), key=lambda numbered: numbered[1].file):
        slices = [(index, 0, fragment.rows) for index, fragment in fragments]
        yield read_slices(manifest, slices, (column,)).column(column)


def _distinct(manifest: Manifest, column: str, values: pa.ChunkedArray) -> set[str]:
    try:
        found = values.unique().to_pylist()
    except pa.ArrowNotImplementedError:
        raise DataError(f"data folder {manifest.uri!r}: column {column!r} is {values.type}; no labels") from None
    if None in found:
        raise DataError(f"data folder {manifest.uri!r}: column {column!r} has rows without a value")
    return {str(value) for value in found}
