"""Bad input of every kind, made from nothing: rows that a source could give, and whole shards of them.

`row_cases()` are rows of which one thing is wrong; `unclip.data.ingest` has to name it. `shard_cases()` are files that a
source has to survive: each lies between two good shards of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tests.support.corpus_pictures import drawing, encode, picture_cases
from tests.support.corpus_shards import parquet_shards, tar_shards

from unclip.data.sources.base import RAW_SCHEMA

EMBEDDING = [0.25, -1.0, 0.5, 2.0]


@dataclass(frozen=True)
class BadRow:
    """A row with one thing wrong.

    Args:
        reason: why it is refused; None where it is kept all the same.
        changes: what differs from a good row; captions are bytes, as they need not be UTF-8.
    """

    name: str
    reason: str | None
    changes: dict[str, Any]


@dataclass(frozen=True)
class BadShard:
    """A file that is not as it should be.

    Args:
        suffix: with the dot.
        make: writes it to a path.
        reasons: how many of its rows have which reason; None counts those that may go on.
    """

    name: str
    suffix: str
    make: Callable[[Path], None]
    reasons: dict[str | None, int] = field(default_factory=dict)


def good_row(number: int) -> dict[str, Any]:
    image = encode(drawing(number), "JPEG")
    return {"key": f"good-{number}", "image": image, "caption": b"A good caption", "vector": EMBEDDING, "note": b"fine"}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """RAW columns and two carried ones; text goes in as bytes, unchecked, as a Parquet reader would take it over."""
    own = [_column([row.get(field.name) for row in rows], field.type) for field in RAW_SCHEMA]
    vector = pa.array([row["vector"] for row in rows], pa.list_(pa.float32()))
    note = _column([row["note"] for row in rows], pa.string())
    return pa.table([*own, vector, note], names=[*RAW_SCHEMA.names, "vector", "note"])


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind != pa.string():
        return pa.array(values, kind)
    encoded = pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    return encoded.view(pa.string())


def row_cases() -> Iterator[BadRow]:
    for name, image, reason in picture_cases():
        yield BadRow(f"picture_{name}", reason, {"image": image})
    for name, (caption, reason) in _CAPTIONS.items():
        yield BadRow(f"caption_{name}", reason, {"caption": caption})
    for name, vector in _EMBEDDINGS.items():
        yield BadRow(f"embedding_{name}", "bad_embedding", {"vector": vector})
    yield BadRow("carried_text_of_latin_1", "invalid_utf8", {"note": b"caf\xe9"})
    yield BadRow("refused_by_its_source", "fetch_failed", {"reason": "fetch_failed", "detail": "404"})


def shard_cases() -> Iterator[BadShard]:
    for name, make, reasons in parquet_shards():
        yield BadShard(f"parquet_{name}", ".parquet", make, reasons)
    for name, suffix, make, reasons in tar_shards():
        yield BadShard(f"tar_{name}", suffix, make, reasons)


_CAPTIONS: dict[str, tuple[bytes | None, str | None]] = {
    "null": (None, "no_caption"),
    "empty": (b"", "no_caption"),
    "of_spaces": (b" \t\r\n  \xc2\xa0\xe3\x80\x80", "no_caption"),
    "of_zero_width_spaces": ("\u200b\ufeff\u2060".encode(), "no_caption"),
    "of_null_bytes": (b"\0\0\0", "no_caption"),
    "of_tags": (b"<p><br/></p><!-- nothing -->", "no_caption"),
    "of_one_letter": (b"a", "caption_too_short"),
    "of_a_megabyte": (b"word " * 200_000, "caption_too_long"),
    "of_a_megabyte_of_spaces": (b" " * 1_000_000, "caption_too_long"),
    "of_3000_letters": (b"a" * 3000, "caption_too_long"),
    "of_latin_1": (b"caf\xe9 au lait", "invalid_utf8"),
    "of_utf16": ("a caption".encode("utf-16"), "invalid_utf8"),
    "with_a_lone_surrogate": (b"a dog \xed\xa0\x80", "invalid_utf8"),
    "cut_in_a_letter": ("naïve"[:3].encode()[:-1], "invalid_utf8"),
    "of_overlong_bytes": (b"a \xc0\xaf b", "invalid_utf8"),
    "with_null_bytes": (b"a\0 dog\0", None),
    "with_overrides_of_direction": ("a \u202egod\u202c".encode(), None),
    "with_entities": (b"salt &amp; pepper &#xFFFFFFFF;", None),
    "with_a_script": (b"<script>alert(1)</script> a dog", None),
    "of_a_thousand_accents": (("a dog" + "\u0301" * 1000).encode(), None),
    "of_emoji": ("👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿".encode(), None),
}

_EMBEDDINGS: dict[str, list[float | None] | None] = {
    "null": None,
    "empty": [],
    "too_short": [1.0, 2.0, 3.0],
    "too_long": [1.0, 2.0, 3.0, 4.0, 5.0],
    "with_nan": [1.0, float("nan"), 3.0, 4.0],
    "with_infinity": [1.0, float("-inf"), 3.0, 4.0],
    "beyond_float16": [1.0, 7e4, 3.0, 4.0],
    "with_a_null": [1.0, None, 3.0, 4.0],
}
