"""Judging whole tables: every row comes out once, with what was asked for; nothing else is touched."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.decode import decode_image
from unclip.data.ingest.records import KEPT_FIELDS, REJECTED_SCHEMA, RecordPolicy, judge
from unclip.data.manifest import DataError
from unclip.data.sources.base import RAW_SCHEMA


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def raw(rows: list[dict[str, Any]], **carried: pa.Array) -> pa.Table:
    filled = [{"key": str(n), "image": png(8, 4, n), "caption": f"caption {n}"} | row for n, row in enumerate(rows)]
    own = [pa.array([row.get(field.name) for row in filled], field.type) for field in RAW_SCHEMA]
    return pa.table([*own, *carried.values()], names=[*RAW_SCHEMA.names, *carried])


def run(table: pa.Table, **policy: Any) -> tuple[pa.Table, pa.Table]:
    ids = np.arange(table.num_rows) * 10 + 7
    kept, rejected = judge(table, ids, "laion", "part-3", RecordPolicy.from_dict(policy))
    assert sorted(kept["id"].to_pylist() + rejected["id"].to_pylist()) == ids.tolist()
    kept.validate(full=True)
    rejected.validate(full=True)
    assert rejected.schema == REJECTED_SCHEMA
    assert list(kept.schema)[: len(KEPT_FIELDS)] == list(KEPT_FIELDS)
    return kept, rejected


def reasons(rejected: pa.Table) -> dict[int, str]:
    return dict(zip(rejected["id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))


def test_a_good_row_becomes_a_record() -> None:
    table = raw([{"caption": " A  <b>dog</b> "}], nsfw=pa.array([0.5], pa.float32()), tags=pa.array([["a", "b"]]))
    kept, rejected = run(table)
    assert rejected.num_rows == 0
    (record,) = kept.to_pylist()
    image = table["image"][0].as_py()
    assert record["image"] == image
    assert {name: record[name] for name in ("id", "caption", "width", "height", "format", "source", "key")} == {
        "id": 7, "caption": "A dog", "width": 8, "height": 4, "format": "png", "source": "laion", "key": "0",
    }  # fmt: skip
    assert record["nsfw"] == 0.5
    assert record["tags"] == ["a", "b"]
    assert kept.schema.field("tags").type == table.schema.field("tags").type


def test_rows_are_split_in_order_and_keep_what_is_theirs() -> None:
    table = raw([{}, {"caption": None}, {}, {"image": b"??"}, {"reason": "fetch_failed", "detail": "404"}, {}])
    kept, rejected = run(table)
    assert kept["id"].to_pylist() == [7, 27, 57]
    assert [decode_image(image).tolist() for image in kept["image"].to_pylist()] == [
        decode_image(png(8, 4, n)).tolist() for n in (0, 2, 5)
    ]
    assert reasons(rejected) == {17: "no_caption", 37: "not_a_picture", 47: "fetch_failed"}
    assert rejected["detail"].to_pylist()[2] == "404"
    assert rejected["part"].to_pylist() == ["part-3"] * 3
    assert rejected["caption"].to_pylist() == [None, "caption 3", "caption 4"]
    assert [image is None for image in rejected["thumbnail"].to_pylist()] == [False, True, False]


def test_judging_rows_together_or_apart_is_the_same() -> None:
    table = raw([{"caption": "" if n % 3 else "ok"} for n in range(7)], nsfw=pa.array([0.1 * n for n in range(7)]))
    policy = RecordPolicy(filter="nsfw < 0.35")
    whole, _ = judge(table, np.arange(7), "s", "p", policy)
    apart = [judge(table.slice(n, 1), np.arange(n, n + 1), "s", "p", policy)[0] for n in range(7)]
    assert pa.concat_tables(apart).combine_chunks() == whole.combine_chunks()


def test_an_empty_table_and_one_with_nothing_kept() -> None:
    table = raw([{"image": None}], nsfw=pa.array([0.5]))
    kept, rejected = run(table)
    assert (kept.num_rows, rejected.num_rows) == (0, 1)
    empty, _ = run(table.slice(0, 0))
    assert empty.schema == kept.schema


def test_filter_reads_carried_and_measured_columns() -> None:
    images = [png(8, 8), png(16, 8), png(8, 4), png(8, 8)]
    table = raw(
        [{"image": image, "caption": "a" * (n + 1)} for n, image in enumerate(images)],
        nsfw=pa.array([0.1, 0.1, 0.1, None]),
        width=pa.array([1000, 2000, 3000, 4000]),
    )
    kept, rejected = run(table, filter="height >= 8 and nsfw < 0.5 and raw_width <= 4000")
    assert kept["id"].to_pylist() == [7, 17]
    assert kept["width"].to_pylist() == [8, 16]
    assert kept["raw_width"].to_pylist() == [1000, 2000]
    assert set(reasons(rejected).values()) == {"filtered"}
    assert rejected["detail"].to_pylist() == [
        "height = 4, nsfw = 0.1, raw_width = 3000: not height >= 8 and nsfw < 0.5 and raw_width <= 4000",
        "height = 8, nsfw = None, raw_width = 4000: not height >= 8 and nsfw < 0.5 and raw_width <= 4000",
    ]
    assert run(table, filter="caption_length > 2")[0]["id"].to_pylist() == [27, 37]


def test_what_a_filter_refuses_is_not_decoded() -> None:
    """A broken picture is `filtered`, not `broken_picture`, where the filter needs no size of it."""
    table = raw([{"image": b"??"}], nsfw=pa.array([0.9]))
    assert reasons(run(table, filter="nsfw < 0.5")[1]) == {7: "filtered"}
    assert reasons(run(table, filter="nsfw < 0.5 and width > 1")[1]) == {7: "not_a_picture"}


def test_embeddings_become_float16_or_are_refused() -> None:
    vectors = [
        [0.5, 1.0, -2.0],
        [1.0, 2.0],
        None,
        [1.0, float("nan"), 0.0],
        [1.0, 7e4, 0.0],
        [1.0, None, 0.0],
        [0.0, 0.0, 1e-3],
    ]
    table = raw([{}] * 7, z=pa.array(vectors, pa.list_(pa.float32())))
    kept, rejected = run(table, embeddings={"z": 3})
    assert kept.schema.field("z").type == pa.list_(pa.float16(), 3)
    assert kept["z"].to_pylist() == [[0.5, 1.0, -2.0], [0.0, 0.0, np.float16(1e-3)]]
    assert set(reasons(rejected)) == {17, 27, 37, 47, 57}
    assert set(reasons(rejected).values()) == {"bad_embedding"}
    assert rejected["detail"].to_pylist()[:3] == [
        "z has 2 values, not 3",
        "there is no z",
        "z has values that are not finite",
    ]


def test_fixed_size_embeddings_pass_through_a_null() -> None:
    fixed = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float16(), 2))
    kept, rejected = run(raw([{}] * 3, z=fixed).slice(1), embeddings={"z": 2})
    assert kept["z"].to_pylist() == [[3.0, 4.0]]
    assert reasons(rejected) == {7: "bad_embedding"}


def test_text_that_is_not_utf8_is_named() -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"caf\xe9", None], pa.binary()).buffers())
    kept, rejected = run(raw([{}, {}, {}], lang=bad))
    assert kept["lang"].to_pylist() == ["ok", None]
    assert reasons(rejected) == {17: "invalid_utf8"}
    assert "'lang'" in rejected["detail"][0].as_py()
    table = raw([{}, {}, {}])
    kept, rejected = run(table.set_column(2, "caption", bad))
    assert reasons(rejected) == {17: "invalid_utf8", 27: "no_caption"}
    assert rejected["caption"].to_pylist() == ["caf\ufffd", None]


def test_text_inside_other_values_that_is_not_utf8() -> None:
    bad = pa.Array.from_buffers(pa.string(), 4, pa.array([b"ok", b"caf\xe9", b"fine", b"good"], pa.binary()).buffers())
    tags = pa.ListArray.from_arrays([0, 1, 3, 4], bad)
    kept, rejected = run(raw([{}] * 3, tags=tags))
    assert kept["tags"].to_pylist() == [["ok"], ["good"]]
    assert reasons(rejected) == {17: "invalid_utf8"}
    kept, rejected = run(raw([{}] * 4, info=pa.StructArray.from_arrays([bad], ["lang"])))
    assert kept["info"].to_pylist() == [{"lang": text} for text in ("ok", "fine", "good")]
    assert reasons(rejected) == {17: "invalid_utf8"}
    assert "'info'" in rejected["detail"][0].as_py()


def test_thumbnails_are_for_the_first_of_each_reason() -> None:
    rows = [{"caption": None}, {"reason": "fetch_failed"}, {"caption": None}, {"caption": None}]
    _, rejected = run(raw(rows), thumbnails=2)
    assert [image is not None for image in rejected["thumbnail"].to_pylist()] == [True, True, True, False]


def test_reencoded_pictures_are_what_is_stored() -> None:
    kept, _ = run(raw([{}, {"image": png(40, 20)}]), pictures={"reencode": {"format": "png", "max_side": 10}})
    assert list(zip(kept["width"].to_pylist(), kept["height"].to_pylist(), strict=True)) == [(8, 4), (10, 5)]
    assert [decode_image(image).shape for image in kept["image"].to_pylist()] == [(4, 8, 3), (5, 10, 3)]


def test_a_policy_is_checked_before_anything_is_read() -> None:
    schema = raw([{}], nsfw=pa.array([0.5])).schema
    RecordPolicy(filter="nsfw < 1 and width > 3").check(schema)
    with pytest.raises(ConfigError, match="there is no column 'lang'"):
        RecordPolicy(filter="lang == 'en'").check(schema)
    with pytest.raises(ConfigError, match="embeddings: there is no column 'z'"):
        RecordPolicy(embeddings={"z": 3}).check(schema)
    with pytest.raises(ConfigError, match=r"filter 'nsfw <': invalid syntax"):
        RecordPolicy.from_dict({"filter": "nsfw <"})


def test_tables_that_are_no_sources_are_refused() -> None:
    with pytest.raises(DataError, match="part 'p'"):
        judge(raw([{}]).drop_columns(["reason"]), np.arange(1), "s", "p", RecordPolicy())
    with pytest.raises(DataError, match="2 ids for 1 rows"):
        judge(raw([{}]), np.arange(2), "s", "p", RecordPolicy())
    with pytest.raises(DataError, match="two columns of the source would be called 'raw_width'"):
        run(raw([{}], width=pa.array([1]), raw_width=pa.array([1])))
    with pytest.raises(DataError, match="'z' is double; an embedding is a list"):
        run(raw([{}], z=pa.array([1.0])), embeddings={"z": 3})
