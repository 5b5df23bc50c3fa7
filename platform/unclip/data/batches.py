"""Records to training batches: fixed-size uint8 tensors, tokens and embeddings; pure in (rows, positions, seed)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.data.decode import DEFAULT_MAX_PIXELS, DecodeError, Picture, decode_image
from unclip.data.degradation import Degradation, make_low_res
from unclip.data.manifest import DataError
from unclip.data.transforms import CROP_STREAM, DEGRADATION_STREAM, random_crop, resize_square, sample_rng

Batch = dict[str, npt.NDArray[Any]]


class BatchSpec(Config):
    """What a stage wants of each record."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square picture in pixels; null where the stage needs no picture."""
    crop_size: int | None = Field(default=None, ge=1)
    """Side of the random crop that is taken of that picture; null for the whole of it."""
    low_res_size: int | None = Field(default=None, ge=1)
    """Side of the low-resolution condition made of the (cropped) picture; null for none."""
    degradation: Degradation = "none"
    """How the condition is corrupted in training."""
    degradation_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of samples whose condition is corrupted; unCLIP is silent, one half is cascaded diffusion's."""
    tokenizer: str | None = None
    """Whose tokens the captions become: `simple` or a CLIP source; null where captions are not needed."""
    context_length: int = Field(default=77, ge=1)
    """Tokens of a caption, padded or cut."""
    embeddings: tuple[str, ...] = ()
    """Columns of embeddings that are handed on."""
    clip_image_size: int | None = Field(default=None, ge=1)
    """Adds `clip_image`, the whole picture at this size, for a frozen CLIP in the stream."""
    clip_tokenizer: str | None = None
    """Adds `clip_tokens`, the caption as a frozen CLIP in the stream reads it: `simple` or a CLIP source."""
    clip_context_length: int = Field(default=77, ge=1)
    """Tokens of a caption for that CLIP."""
    label_column: str | None = None
    """Column that holds each record's class, of any type; adds `label`. Null where no classes are needed."""
    classes: tuple[str, ...] = ()
    """The column's values as text; a record's label is the position of its value here."""
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1)
    """Larger pictures are refused before they are decoded."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size is None and (self.crop_size or self.low_res_size):
            raise ValueError("crop_size and low_res_size need image_size")
        if self.image_size is not None and self.crop_size is not None and self.crop_size > self.image_size:
            raise ValueError(f"crop_size = {self.crop_size} is larger than image_size = {self.image_size}")
        if self.low_res_size is not None and self.output_size % self.low_res_size:
            raise ValueError(f"low_res_size = {self.low_res_size} does not divide the side {self.output_size}")
        if len(set(self.classes)) != len(self.classes):
            repeated = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"classes: {repeated!r} is there more than once")
        return self

    @property
    def output_size(self) -> int:
        """Side of `image` in the batch; 0 without a picture."""
        return self.crop_size or self.image_size or 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's pictures."""
        sides = (self.output_size, self.low_res_size or 0, self.clip_image_size or 0)
        return 3 * sum(side * side for side in sides)

    @property
    def has_captions(self) -> bool:
        return self.tokenizer is not None or self.clip_tokenizer is not None

    def columns(self) -> tuple[str, ...]:
        """Columns that records need to have."""
        has_picture = self.image_size is not None or self.clip_image_size is not None
        wanted = {"id": True, "image": has_picture, "caption": self.has_captions}
        label = () if self.label_column is None else (self.label_column,)
        names = (*(name for name, needed in wanted.items() if needed), *self.embeddings, *label)
        return tuple(dict.fromkeys(names))


def make_batch(table: pa.Table, positions: npt.NDArray[np.int64], spec: BatchSpec, seed: int) -> Batch:
    """The batch of the table's rows, which stand at `positions` (B,) of the run.

    Returns contiguous arrays: `id` (B,) int64, `position` (B,) int64 and, as the spec asks, `image` (B, H, H, 3) uint8,
    `low_res` (B, h, h, 3) uint8, `clip_image` (B, S, S, 3) uint8, `tokens` and `clip_tokens` (B, L) int32, each of
    `spec.embeddings` (B, D) float16, and `label` (B,) int64. Crops and degradations depend on (seed, position) alone.

    Raises `DataError` naming the id and the reason where a row cannot be used.
    """
    if len(positions) != table.num_rows:
        raise ValueError(f"{len(positions)} positions for {table.num_rows} rows")
    ids = table.column("id").to_numpy().astype(np.int64)
    batch: Batch = {"id": ids, "position": np.ascontiguousarray(positions, dtype=np.int64)}
    if "image" in spec.columns():
        batch |= _pictures(table.column("image"), batch, spec, seed)
    if spec.has_captions:
        texts = table.column("caption").to_pylist()
        _refuse(ids, [text is None for text in texts], "has no caption")
        batch |= _tokens(texts, spec)
    for name in spec.embeddings:
        batch[name] = _embedding(table.column(name), name, ids)
    if spec.label_column is not None:
        batch["label"] = _labels(table.column(spec.label_column), spec, ids)
    return batch


def warm_up(spec: BatchSpec) -> None:
    """Imports and reads what `make_batch` needs for `spec`, which takes seconds, before the first records are there."""
    if spec.has_captions:
        _tokens([""], spec)


def _tokens(texts: list[str], spec: BatchSpec) -> Batch:
    wanted = {
        "tokens": (spec.tokenizer, spec.context_length),
        "clip_tokens": (spec.clip_tokenizer, spec.clip_context_length),
    }
    return {
        name: np.ascontiguousarray(_tokenizer(source)(texts, length), dtype=np.int32)
        for name, (source, length) in wanted.items()
        if source is not None
    }


def _pictures(column: pa.ChunkedArray, batch: Batch, spec: BatchSpec, seed: int) -> Batch:
    target = max(spec.image_size or 0, spec.clip_image_size or 0)
    samples: dict[str, list[Picture]] = {}
    for encoded, record, position in zip(column, batch["id"], batch["position"], strict=True):
        if not encoded.is_valid:
            raise DataError(f"record {record}: has no image")
        try:
            picture = decode_image(encoded.as_py(), max_pixels=spec.max_pixels, target=target)
        except DecodeError as error:
            raise DataError(f"record {record}: {error}") from error
        for name, array in _views(picture, spec, seed, int(position)).items():
            samples.setdefault(name, []).append(array)
    return {name: np.stack(arrays) for name, arrays in samples.items()}


def _views(picture: Picture, spec: BatchSpec, seed: int, position: int) -> dict[str, Picture]:
    """Every array that one picture gives."""
    views = {}
    if spec.clip_image_size is not None:
        views["clip_image"] = resize_square(picture, spec.clip_image_size)
    if spec.image_size is None:
        return views
    image = resize_square(picture, spec.image_size)
    if spec.crop_size is not None:
        image = random_crop(image, spec.crop_size, sample_rng(seed, position, CROP_STREAM))
    views["image"] = image
    if spec.low_res_size is not None:
        views["low_res"] = make_low_res(
            image,
            spec.low_res_size,
            degradation=spec.degradation,
            probability=spec.degradation_probability,
            rng=sample_rng(seed, position, DEGRADATION_STREAM),
        )
    return views


def _embedding(column: pa.ChunkedArray, name: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        raise DataError(f"column {name!r} is {array.type}; an embedding is a fixed-size list of float16")
    _refuse(ids, array.is_null().to_pylist(), f"has no {name}")
    values = array.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), array.type.list_size).astype(np.float16)
    _refuse(ids, (~np.isfinite(values).all(axis=1)).tolist(), f"{name} is not finite")
    return np.ascontiguousarray(values)


def _labels(column: pa.ChunkedArray, spec: BatchSpec, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    positions = {name: position for position, name in enumerate(spec.classes)}
    labels = np.empty(len(ids), dtype=np.int64)
    for row, value in enumerate(column.to_pylist()):
        if value is None or str(value) not in positions:
            raise DataError(
                f"record {ids[row]}: {spec.label_column} = {value!r} is none of the {len(positions)} classes"
            )
        labels[row] = positions[str(value)]
    return labels


def _refuse(ids: npt.NDArray[np.int64], is_bad: list[bool], reason: str) -> None:
    if any(is_bad):
        raise DataError(f"record {ids[is_bad.index(True)]}: {reason}")


@lru_cache(maxsize=4)
def _tokenizer(source: str) -> Callable[[list[str], int], npt.NDArray[np.int32]]:
    from unclip.models.clip import tokenizer_for  # torch is only loaded where captions are wanted

    tokenizer: Callable[[list[str], int], npt.NDArray[np.int32]] = tokenizer_for(None if source == "simple" else source)
    return tokenizer
