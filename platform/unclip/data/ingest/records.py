"""Rows as sources give them to records as training wants them, and the rest with its reasons: nothing gets lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from unclip.config.base import Config, ConfigError
from unclip.data.ingest.captions import CaptionPolicy, clean_caption
from unclip.data.ingest.carried import carried_names, check_text, uniform_embeddings
from unclip.data.ingest.filters import Filter, compile_filter, parse_filter
from unclip.data.ingest.hashes import GREY_SIDE, perceptual_hashes
from unclip.data.ingest.pictures import Examined, PicturePolicy, examine, thumbnail
from unclip.data.ingest.reasons import Refusal
from unclip.data.manifest import DataError
from unclip.data.sources.base import RAW_SCHEMA

KEPT_FIELDS = (
    pa.field("id", pa.int64()),
    pa.field("image", pa.large_binary()),
    pa.field("caption", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("content_hash", pa.binary(32)),
    pa.field("perceptual_hash", pa.uint64()),
    pa.field("source", pa.string()),
    pa.field("key", pa.string()),
)
"""What every record begins with: `image` encoded, `width` and `height` upright and in pixels, the hashes those of
`unclip.data.ingest.hashes`, `source` and `key` where it came from."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("source", pa.string()),
        pa.field("part", pa.string()),
        pa.field("key", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("thumbnail", pa.large_binary()),
    ]
)
"""A row that is not kept: `caption` as it came (its first 16 KiB, what is not UTF-8 replaced), `thumbnail` a small JPEG
or null."""

_MEASURED = pa.schema([pa.field(name, pa.int32()) for name in ("caption_length", "width", "height")])
_SIZES = {"width", "height"}
_OWN_NAMES = [*(field.name for field in KEPT_FIELDS), *_MEASURED.names]
_CAPTION_BYTES = 1 << 14  # of a rejected caption that are kept


class RecordPolicy(Config):
    """Which rows become records, and in what form."""

    pictures: PicturePolicy = PicturePolicy()
    """Which pictures are kept, and how they are stored."""
    captions: CaptionPolicy = CaptionPolicy()
    """Which captions are kept, after cleaning."""
    filter: str | None = None
    """Condition on the columns of the source and on width, height and caption_length, as in
    "nsfw < 0.3 and aesthetic >= 5 and lang in ('en', 'de')"; rows for which it is not true are quarantined. A column
    of the source that is named like one of ours is `raw_NAME`."""
    embeddings: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Columns of the source that hold embeddings, and their length: they become float16, and rows whose embedding is
    missing, of another length or not finite are quarantined."""
    thumbnails: int = Field(default=4, ge=0)
    """Rows of each reason, in a table of at most 256, whose picture is kept in the quarantine as a thumbnail."""

    @model_validator(mode="after")
    def _filter_is_an_expression(self) -> Self:
        if self.filter is not None:
            parse_filter(self.filter)
        return self

    def check(self, schema: pa.Schema) -> None:
        """Raises `ConfigError` where the filter or an embedding does not fit a source whose tables have `schema`."""
        carried = _carried_schema(schema)
        self.bind_filter(carried)
        for name in self.embeddings:
            if name not in carried.names:
                raise ConfigError(f"embeddings: there is no column {name!r}; columns: {', '.join(carried.names)}")

    def bind_filter(self, carried: pa.Schema) -> Filter | None:
        """The filter for the measured columns and the `carried` ones; raises `ConfigError` where it does not fit."""
        return None if self.filter is None else compile_filter(self.filter, pa.schema([*_MEASURED, *carried]))


@dataclass(frozen=True)
class _Rows:
    """The rows of a table while they are judged; `refusals` grows from step to step, the first reason counts.

    Args:
        raw: as the source gave them.
        captions: cleaned; those of refused rows mean nothing.
        carried: the source's further columns, renamed and checked.
        examined: the pictures of the rows that are kept.
        refusals: why rows are not kept.
    """

    raw: pa.Table
    captions: list[str]
    carried: pa.Table
    examined: dict[int, Examined]
    refusals: dict[int, Refusal]


def judge(
    raw: pa.Table, ids: npt.NDArray[np.int64], source: str, part: str, policy: RecordPolicy
) -> tuple[pa.Table, pa.Table]:
    """Splits a source's rows into records and rejected rows, both in the order they came in.

    Args:
        raw: columns of `RAW_SCHEMA` and the columns to carry along.
        ids: (N,) int64, one for each row.
        source: name of the source; `part` that of its part.

    Returns (kept, rejected): kept has `KEPT_FIELDS` and the carried columns, rejected has `REJECTED_SCHEMA`, together they
    have N rows. Pure: equal rows give equal tables.

    Raises `ConfigError` where the policy does not fit the columns, `DataError` where the columns are not a source's.
    """
    if raw.column_names[: len(RAW_SCHEMA)] != RAW_SCHEMA.names or len(ids) != raw.num_rows:
        raise DataError(f"part {part!r}: {len(ids)} ids for {raw.num_rows} rows of {', '.join(raw.column_names)}")
    policy.check(raw.schema)
    refusals = _refused_by_source(raw)
    captions = _clean_captions(raw["caption"], policy, refusals)
    rows = _Rows(raw, captions, _carried(raw, policy, refusals), {}, refusals)
    row_filter = policy.bind_filter(rows.carried.schema)
    needs_size = row_filter is not None and not _SIZES.isdisjoint(row_filter.columns)
    if row_filter is not None and not needs_size:  # before the pictures: what is filtered need not be decoded
        _apply(row_filter, rows)
    _examine(rows, policy.pictures)
    if row_filter is not None and needs_size:
        _apply(row_filter, rows)
    return _kept(rows, ids, source), _rejected(rows, ids, source, part, policy)


def _carried_schema(schema: pa.Schema) -> pa.Schema:
    """The further columns of a source, under the names they have in records."""
    fields = list(schema)[len(RAW_SCHEMA) :]
    names = carried_names([field.name for field in fields], _OWN_NAMES)
    return pa.schema([field.with_name(name) for field, name in zip(fields, names, strict=True)])


def _refused_by_source(raw: pa.Table) -> dict[int, Refusal]:
    given = zip(raw["reason"].to_pylist(), raw["detail"].to_pylist(), strict=True)
    return {row: Refusal(reason, detail or "") for row, (reason, detail) in enumerate(given) if reason is not None}


def _clean_captions(column: pa.ChunkedArray, policy: RecordPolicy, refusals: dict[int, Refusal]) -> list[str]:
    captions = []
    for row, encoded in enumerate(column.cast(pa.large_binary()).to_pylist()):
        caption = clean_caption(encoded, policy.captions)
        if isinstance(caption, Refusal):
            refusals.setdefault(row, caption)
        captions.append("" if isinstance(caption, Refusal) else caption)
    return captions


def _carried(raw: pa.Table, policy: RecordPolicy, refusals: dict[int, Refusal]) -> pa.Table:
    schema = _carried_schema(raw.schema)
    columns: list[pa.ChunkedArray | pa.Array] = []
    for name, column in zip(schema.names, raw.columns[len(RAW_SCHEMA) :], strict=True):
        if name in policy.embeddings:
            embeddings, refused = uniform_embeddings(column, name, policy.embeddings[name])
            columns.append(embeddings)
        else:
            refused = check_text(column, name)
            columns.append(column)
        for row, refusal in refused.items():
            refusals.setdefault(row, refusal)
    return pa.table(columns, names=schema.names)


def _apply(row_filter: Filter, rows: _Rows) -> None:
    """Refuses the rows that do not pass."""
    sizes = [rows.examined.get(row) for row in range(rows.raw.num_rows)]
    measured = [
        [len(caption) for caption in rows.captions],
        [None if size is None else size.width for size in sizes],
        [None if size is None else size.height for size in sizes],
    ]
    columns = [pa.array(values, pa.int32()) for values in measured]
    table = pa.table([*columns, *rows.carried.columns], names=[*_MEASURED.names, *rows.carried.column_names])
    for row, passes in enumerate(row_filter.evaluate(table)):
        if not passes and row not in rows.refusals:
            values = ", ".join(f"{name} = {str(table[name][row])[:100]}" for name in row_filter.columns)
            rows.refusals[row] = Refusal("filtered", f"{values}: not {row_filter.text}")


def _examine(rows: _Rows, policy: PicturePolicy) -> None:
    for row, encoded in enumerate(rows.raw["image"]):
        if row in rows.refusals:
            continue
        found = examine(encoded.as_py(), policy)
        if isinstance(found, Refusal):
            rows.refusals[row] = found
        else:
            rows.examined[row] = found


def _kept(rows: _Rows, ids: npt.NDArray[np.int64], source: str) -> pa.Table:
    kept = [row for row in range(rows.raw.num_rows) if row not in rows.refusals]
    pictures = [rows.examined[row] for row in kept]
    greys = np.array([picture.grey for picture in pictures], np.uint8).reshape(-1, GREY_SIDE, GREY_SIDE)
    chosen = rows.raw.select(["key", "image"]).take(pa.array(kept, pa.int64()))
    values = {
        "id": ids[kept],
        "image": _stored(chosen["image"], pictures),
        "caption": [rows.captions[row] for row in kept],
        "width": [picture.width for picture in pictures],
        "height": [picture.height for picture in pictures],
        "format": [picture.format for picture in pictures],
        "content_hash": [picture.content_hash for picture in pictures],
        "perceptual_hash": perceptual_hashes(greys),
        "source": [source] * len(kept),
        "key": chosen["key"],
    }
    columns = [_column(values[field.name], field.type) for field in KEPT_FIELDS]
    carried = rows.carried.take(pa.array(kept, pa.int64()))
    fields = [*KEPT_FIELDS, *carried.schema]
    return pa.table([*columns, *carried.columns], schema=pa.schema(fields))


def _stored(images: pa.ChunkedArray, pictures: list[Examined]) -> Any:
    if all(picture.stored is None for picture in pictures):
        return images  # not copied through Python
    return [image.as_py() if new.stored is None else new.stored for image, new in zip(images, pictures, strict=True)]


def _column(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def _rejected(rows: _Rows, ids: npt.NDArray[np.int64], source: str, part: str, policy: RecordPolicy) -> pa.Table:
    refused = sorted(rows.refusals)
    chosen = rows.raw.select(["key", "image", "caption"]).take(pa.array(refused, pa.int64()))
    captions = chosen["caption"].cast(pa.large_binary()).to_pylist()
    columns = [
        ids[refused],
        [source] * len(refused),
        [part] * len(refused),
        chosen["key"],
        [rows.refusals[row].reason for row in refused],
        [rows.refusals[row].detail for row in refused],
        [None if caption is None else caption[:_CAPTION_BYTES].decode("utf-8", "replace") for caption in captions],
        _thumbnails(chosen["image"], [rows.refusals[row].reason for row in refused], policy),
    ]
    arrays = [_column(values, field.type) for values, field in zip(columns, REJECTED_SCHEMA, strict=True)]
    return pa.table(arrays, schema=REJECTED_SCHEMA)


def _thumbnails(images: pa.ChunkedArray, reasons: list[str], policy: RecordPolicy) -> list[bytes | None]:
    """The first pictures of each reason, as far as they can be decoded."""
    tried: Counter[str] = Counter()
    made: list[bytes | None] = []
    for encoded, reason in zip(images, reasons, strict=True):
        tried[reason] += 1
        is_wanted = tried[reason] <= policy.thumbnails
        made.append(thumbnail(encoded.as_py(), policy.pictures.max_pixels) if is_wanted else None)
    return made
