"""Columns that a source brings beside picture and caption: renamed where they clash, checked, embeddings made uniform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from unclip.data.ingest.reasons import Refusal
from unclip.data.manifest import DataError

CLASH_PREFIX = "raw_"
"""Put before the name of a source's column that is also a name of our own (`width`, `format`, …)."""


def carried_names(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The names under which a source's columns are carried; raises `DataError` where two would be the same."""
    renamed = [CLASH_PREFIX + name if name in taken else name for name in names]
    for name in renamed:
        if renamed.count(name) > 1:
            raise DataError(f"two columns of the source would be called {name!r}")
    return renamed


def check_text(column: pa.ChunkedArray, name: str) -> dict[int, Refusal]:
    """Rows with text, also inside lists and structs, that is not UTF-8: Arrow takes it over from a file without looking."""
    if _is_valid(column):
        return {}
    return {row: _not_utf8(name) for row in range(len(column)) if not _is_valid(column.take([row]))}


def uniform_embeddings(
    column: pa.ChunkedArray, name: str, size: int
) -> tuple[pa.FixedSizeListArray, dict[int, Refusal]]:
    """Lists of numbers as fixed-size lists of float16; rows that are null, of another length or not finite are refused.

    Refused rows hold zeros. Raises `DataError` where the column holds no lists of numbers.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(f"column {name!r} is {kind}; an embedding is a list of numbers")
    lengths = column.combine_chunks().value_lengths().to_pylist()
    fitting = np.array([row for row, length in enumerate(lengths) if length == size], dtype=np.int64)
    values = np.zeros((len(lengths), size), np.float16)
    values[fitting] = _numbers(column.take(fitting), size)
    finite = np.asarray(np.isfinite(values).all(axis=1))
    values[~finite] = 0.0
    refusals = {
        row: Refusal("bad_embedding", _problem(name, length, size))
        for row, length in enumerate(lengths)
        if length != size or not finite[row]
    }
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size), refusals


def _numbers(column: pa.ChunkedArray, size: int) -> npt.NDArray[np.float16]:
    flat = pc.list_flatten(column).to_numpy()
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused for that
        return np.asarray(flat, dtype=np.float64).astype(np.float16).reshape(-1, size)


def _problem(name: str, length: int | None, size: int) -> str:
    if length is None:
        return f"there is no {name}"
    return f"{name} has {length} values, not {size}" if length != size else f"{name} has values that are not finite"


def _not_utf8(name: str) -> Refusal:
    return Refusal("invalid_utf8", f"column {name!r} holds text that is not UTF-8")


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
