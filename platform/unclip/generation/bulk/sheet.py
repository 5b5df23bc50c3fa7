"""A page of pictures from all over a job, read back from what was written."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from unclip.data.decode import decode_image
from unclip.generation.bulk.receipts import Receipt, StoredFile
from unclip.generation.outputs import GridRow, captioned_grid, read_png, read_png_metadata
from unclip.utils import storage

SHEET_ROWS = 16


class _Place(NamedTuple):
    """A picture: its number among those of a unit."""

    receipt: Receipt
    picture: int


def sample_sheet(out: str, receipts: Sequence[Receipt], sizes: Sequence[int]) -> Image.Image | None:
    """The pictures of a job if they are few, else a sample at equal distances; None where there are none.

    Args:
        receipts: of all units, in their order.
        sizes: sides in pixels of the pictures of format folder, each of which gets a column.
    """
    places = _spread(receipts)
    if not places:
        return None
    if places[0].receipt.files:
        return captioned_grid([_of_files(out, place, sizes) for place in places], [f"{size} px" for size in sizes])
    rows = [_of_tar(out, place) if _is_tar(place.receipt.shard) else _of_parquet(out, place) for place in places]
    return captioned_grid(rows, [""])


def _spread(receipts: Sequence[Receipt]) -> list[_Place]:
    ends = list(accumulate(receipt.pictures for receipt in receipts))
    total = ends[-1] if ends else 0
    shown = min(total, SHEET_ROWS)
    places = []
    for index in range(shown):
        picture = index * (total - 1) // max(1, shown - 1)
        unit = next(unit for unit, end in enumerate(ends) if picture < end)
        places.append(_Place(receipts[unit], picture - ends[unit] + receipts[unit].pictures))
    return places


def _of_files(out: str, place: _Place, sizes: Sequence[int]) -> GridRow:
    """All sizes of a picture; a row may have asked for no more than the smaller ones."""
    files = place.receipt.files
    names = sorted({name.partition("/")[2] for name in files}, key=_row_and_seed)
    here = [f"{size}/{names[place.picture]}" for size in sizes]
    uris = [storage.join(out, name) if name in files else None for name in here]
    first = next(uri for uri in uris if uri is not None)
    return read_png_metadata(first)["prompt"], [None if uri is None else read_png(uri) for uri in uris]


def _row_and_seed(name: str) -> tuple[int, int]:
    row, _, seed = name.removesuffix(".png").partition("-")
    return int(row), int(seed)


def _is_tar(shard: StoredFile | None) -> bool:
    return shard is not None and shard.file.endswith(".tar")


def _of_parquet(out: str, place: _Place) -> GridRow:
    """Reads one row group."""
    shard = place.receipt.shard
    assert shard is not None
    ends = list(accumulate(shard.row_groups))
    group = next(group for group, end in enumerate(ends) if place.picture < end)
    fs, path = storage.filesystem(storage.join(out, shard.file))
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file).read_row_group(group, columns=["prompt", "image"])
    (row,) = table.slice(place.picture - ends[group] + shard.row_groups[group], 1).to_pylist()
    return row["prompt"], [decode_image(row["image"])]


def _of_tar(out: str, place: _Place) -> GridRow:
    """Goes from head to head up to the picture, which is the first of three members: it, its prompt, its columns."""
    shard = place.receipt.shard
    assert shard is not None
    fs, path = storage.filesystem(storage.join(out, shard.file))
    with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        start = 3 * place.picture
        image, prompt = (_content(tar, member) for member in islice(tar, start, start + 2))
        return prompt.decode(), [decode_image(image)]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
