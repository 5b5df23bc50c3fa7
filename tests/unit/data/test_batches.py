"""Training batches: documented shapes, keyed randomness that ignores batching, clear errors for unusable rows."""

from __future__ import annotations

import io

import numpy as np
import open_clip
import pyarrow as pa
import pytest
from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec, make_batch
from unclip.data.degradation import make_low_res
from unclip.data.manifest import DataError
from unclip.data.transforms import area_downscale, sample_rng

ROWS = 8


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def records(pictures: np.ndarray) -> pa.Table:
    embeds = np.random.default_rng(1).standard_normal((ROWS, 6)).astype(np.float16)
    return pa.table(
        {
            "id": pa.array(range(100, 100 + ROWS), pa.int64()),
            "image": pa.array([png(p) for p in pictures], pa.large_binary()),
            "caption": [f"picture number {i}" for i in range(ROWS)],
            "image_embed": pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), 6),
        }
    )


FULL = BatchSpec(
    image_size=32,
    crop_size=16,
    low_res_size=4,
    degradation="bsr",
    tokenizer="simple",
    context_length=12,
    embeddings=("image_embed",),
    clip_image_size=24,
    clip_tokenizer="simple",
    clip_context_length=9,
)


def test_arrays_are_as_documented(records: pa.Table) -> None:
    assert FULL.columns() == ("id", "image", "caption", "image_embed")
    batch = make_batch(records, np.arange(ROWS) + 40, FULL, seed=0)
    described = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert described == {
        "id": ("int64", (ROWS,)),
        "position": ("int64", (ROWS,)),
        "image": ("uint8", (ROWS, 16, 16, 3)),
        "low_res": ("uint8", (ROWS, 4, 4, 3)),
        "clip_image": ("uint8", (ROWS, 24, 24, 3)),
        "tokens": ("int32", (ROWS, 12)),
        "clip_tokens": ("int32", (ROWS, 9)),
        "image_embed": ("float16", (ROWS, 6)),
    }
    assert all(array.flags.c_contiguous for array in batch.values())
    assert batch["id"].tolist() == list(range(100, 108))
    assert batch["position"].tolist() == list(range(40, 48))


def test_contents_are_the_records(records: pa.Table, pictures: np.ndarray) -> None:
    spec = BatchSpec(image_size=32, low_res_size=8, tokenizer="simple", context_length=12, embeddings=("image_embed",))
    batch = make_batch(records, np.arange(ROWS), spec, seed=0)
    np.testing.assert_array_equal(batch["image"], pictures)
    np.testing.assert_array_equal(batch["low_res"][3], area_downscale(pictures[3], 8))
    expected = open_clip.SimpleTokenizer()(records.column("caption").to_pylist(), context_length=12)
    np.testing.assert_array_equal(batch["tokens"], expected.numpy())
    np.testing.assert_array_equal(batch["image_embed"], np.array(records.column("image_embed").to_pylist(), np.float16))


def test_low_res_is_made_of_the_crop_with_the_samples_own_stream(records: pa.Table) -> None:
    batch = make_batch(records, np.arange(ROWS), FULL, seed=3)
    for row in range(ROWS):
        expected = make_low_res(
            batch["image"][row], 4, degradation="bsr", probability=0.5, rng=sample_rng(3, row, stream=1)
        )
        np.testing.assert_array_equal(batch["low_res"][row], expected)


def test_a_sample_does_not_depend_on_its_batch(records: pa.Table) -> None:
    positions = np.arange(ROWS) + 1000
    whole = make_batch(records, positions, FULL, seed=7)
    for rows in ([5], [6, 2], [7, 0, 3]):
        part = make_batch(records.take(rows), positions[rows], FULL, seed=7)
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][rows], err_msg=name)
    other_epoch = make_batch(records, positions + ROWS, FULL, seed=7)
    other_seed = make_batch(records, positions, FULL, seed=8)
    assert not np.array_equal(other_epoch["image"], whole["image"])
    assert not np.array_equal(other_seed["image"], whole["image"])


def test_only_what_is_asked_for(records: pa.Table) -> None:
    spec = BatchSpec(embeddings=("image_embed",))
    assert spec.columns() == ("id", "image_embed")
    batch = make_batch(records.select(["id", "image_embed"]), np.arange(ROWS), spec, seed=0)
    assert set(batch) == {"id", "position", "image_embed"}


def test_a_clip_in_the_stream_reads_the_caption_by_itself(records: pa.Table) -> None:
    spec = BatchSpec(clip_tokenizer="simple", clip_context_length=9)
    assert spec.columns() == ("id", "caption")
    batch = make_batch(records, np.arange(ROWS), spec, seed=0)
    expected = open_clip.SimpleTokenizer()(records.column("caption").to_pylist(), context_length=9)
    np.testing.assert_array_equal(batch["clip_tokens"], expected.numpy())
    assert "tokens" not in batch


def test_sliced_embeddings_stay_with_their_rows(records: pa.Table) -> None:
    spec = BatchSpec(embeddings=("image_embed",))
    whole = make_batch(records, np.arange(ROWS), spec, seed=0)
    part = make_batch(records.slice(3, 2), np.arange(2), spec, seed=0)
    np.testing.assert_array_equal(part["image_embed"], whole["image_embed"][3:5])


LABELLED = BatchSpec(label_column="kind", classes=("7", "cat", "0.5"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["cat", "7", "0.5", "cat"] * 2), [1, 0, 2, 1] * 2),
        (pa.array([7] * ROWS), [0] * ROWS),
        (pa.array([0.5] * ROWS), [2] * ROWS),
        (pa.array(["cat"] * ROWS).dictionary_encode(), [1] * ROWS),
    ],
    ids=["text", "integers", "floats", "dictionary"],
)
def test_a_label_is_the_position_of_its_value_as_text(records: pa.Table, values: pa.Array, expected: list[int]) -> None:
    assert LABELLED.columns() == ("id", "kind")
    batch = make_batch(records.append_column("kind", values), np.arange(ROWS), LABELLED, seed=0)
    assert batch["label"].dtype == np.int64
    assert batch["label"].tolist() == expected


@pytest.mark.parametrize(("bad", "message"), [("dog", "kind = 'dog' is none of the 3 classes"), (None, "kind = None")])
def test_values_outside_the_classes_are_named(records: pa.Table, bad: str | None, message: str) -> None:
    table = records.append_column("kind", pa.array(["cat"] * 5 + [bad] + ["cat"] * (ROWS - 6)))
    with pytest.raises(DataError, match=f"record 105: {message}"):
        make_batch(table, np.arange(ROWS), LABELLED, seed=0)


def test_captions_can_be_classes(records: pa.Table) -> None:
    captions = tuple(records.column("caption").to_pylist())
    spec = BatchSpec(tokenizer="simple", label_column="caption", classes=captions)
    assert spec.columns() == ("id", "caption")
    assert make_batch(records, np.arange(ROWS), spec, seed=0)["label"].tolist() == list(range(ROWS))


def replaced(records: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return records.set_column(records.schema.get_field_index(column), column, values)


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("image", b"nonsense", "record 103: not a readable picture"),
        ("image", None, "record 103: has no image"),
        ("caption", None, "record 103: has no caption"),
        ("image_embed", None, "record 103: has no image_embed"),
        ("image_embed", [float("nan")] * 6, "record 103: image_embed is not finite"),
    ],
)
def test_unusable_rows_are_named(records: pa.Table, column: str, bad: object, message: str) -> None:
    values = records.column(column).to_pylist()
    values[3] = bad
    table = replaced(records, column, pa.array(values, records.schema.field(column).type))
    with pytest.raises(DataError, match=message):
        make_batch(table, np.arange(ROWS), FULL, seed=0)


def test_oversized_picture_is_refused(records: pa.Table) -> None:
    with pytest.raises(DataError, match="record 100: 32x32 pixels: more than 1000"):
        make_batch(records, np.arange(ROWS), BatchSpec(image_size=8, max_pixels=1000), seed=0)


def test_embedding_of_another_type_is_refused(records: pa.Table) -> None:
    table = replaced(records, "image_embed", pa.array([[1.0, 2.0]] * ROWS))
    with pytest.raises(DataError, match=r"'image_embed' is list<.*fixed-size list of float16"):
        make_batch(table, np.arange(ROWS), BatchSpec(embeddings=("image_embed",)), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": 8}, "need image_size"),
        ({"image_size": 8, "crop_size": 16}, "crop_size = 16 is larger than image_size = 8"),
        ({"image_size": 64, "crop_size": 16, "low_res_size": 6}, "low_res_size = 6 does not divide the side 16"),
        ({"label_column": "kind", "classes": ["a", "b", "a"]}, "classes: 'a' is there more than once"),
        ({"degradation": "fog"}, "degradation = 'fog'"),
        ({"degradation_probability": 1.5}, r"degradation_probability = 1\.5"),
    ],
)
def test_bad_specs_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSpec.from_dict(settings)
