"""The held-out records of a run: always the same rows, as the batches that its objective trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import ClipEmbedStage, clip_inputs
from unclip.data.manifest import Manifest, read_slices, scan
from unclip.models.clip import load_clip
from unclip.training.config import TrainConfig

Batch = dict[str, torch.Tensor]


class HeldOut:
    """The first `validation.samples` records of `validation.data`.

    Args:
        config: a prepared run's configuration.
        device: where its batches go.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        assert config.validation.data is not None
        self.spec, self._embed = _source_of_batches(config, device)
        self.manifest = scan(config.validation.data, self.spec.columns())
        self.count = min(config.validation.samples, self.manifest.rows)
        self._seed = config.validation.seed
        self._device = device

    def batches(self, size: int, *, stop: int | None = None) -> Iterator[Batch]:
        """What the objective trains on, `size` records at once, up to record `stop`; crops and degradations are fixed."""
        stop = self.count if stop is None else stop
        for start in range(0, stop, size):
            rows = range(start, min(start + size, stop))
            batch = make_batch(self._table(rows, self.spec.columns()), np.array(rows), self.spec, self._seed)
            yield self._tensors(batch if self._embed is None else self._embed.process(batch))

    def first(self, count: int) -> Batch:
        """The same of the first `count` records, at most all."""
        return next(self.batches(self.count, stop=min(count, self.count)))

    def pictures(self, rows: Sequence[int], spec: BatchSpec) -> Batch:
        """The pictures of records `rows`, made as `spec` says."""
        return self._tensors(make_batch(self._table(rows, spec.columns()), np.array(rows), spec, self._seed))

    def text(self, column: str, count: int) -> list[str]:
        """A column of the first `count` records as text; empty where there is no value."""
        values = self._table(range(min(count, self.count)), (column,)).column(column).to_pylist()
        return ["" if value is None else str(value) for value in values]

    def _table(self, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        return read_slices(self.manifest, _slices(self.manifest, rows), columns)

    def _tensors(self, batch: dict[str, np.ndarray]) -> Batch:
        return {name: torch.from_numpy(np.ascontiguousarray(a)).to(self._device) for name, a in batch.items()}


def training_columns(config: TrainConfig) -> tuple[str, ...]:
    """The columns that held-out records need for the batches of the run's objective."""
    spec = config.objective.batch_spec()
    if config.data.embeddings == "stream" and spec.embeddings:  # CLIP makes them of picture and caption
        return tuple(dict.fromkeys(("id", "image", "caption", *spec.model_copy(update={"embeddings": ()}).columns())))
    return spec.columns()


def _source_of_batches(config: TrainConfig, device: torch.device) -> tuple[BatchSpec, ClipEmbedStage | None]:
    """What a batch is made of records by, and the CLIP that adds the embeddings where the records do not have them."""
    spec = config.objective.batch_spec()
    if config.data.embeddings == "columns" or not spec.embeddings:
        return spec, None
    assert config.clip is not None
    inputs = {"embeddings": (), **clip_inputs(load_clip(config.clip), config.clip)}
    stage = ClipEmbedStage(config.clip, str(device), text_states="text_states" in spec.embeddings)
    stage.setup()
    return spec.merged(inputs), stage


def _slices(manifest: Manifest, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """The places of `rows`, which count from the folder's first; those that follow one another as one slice."""
    ends = np.cumsum([fragment.rows for fragment in manifest.fragments])
    slices: list[tuple[int, int, int]] = []
    for row in rows:
        fragment = int(np.searchsorted(ends, row, side="right"))
        place = row - int(ends[fragment]) + manifest.fragments[fragment].rows
        if slices and slices[-1][0] == fragment and slices[-1][2] == place:
            slices[-1] = fragment, slices[-1][1], place + 1
        else:
            slices.append((fragment, place, place + 1))
    return slices
