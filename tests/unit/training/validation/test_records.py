"""Held-out records: always the same rows, whatever asks for them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unclip.data.batches import BatchSpec
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.validation.records import HeldOut

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of an upsampler; 30 records in two files of row groups of 7, every pixel of record i red as i."""
    folder = tmp_path_factory.mktemp("held_out")
    for number, ids in enumerate((range(18), range(18, 30))):
        pictures = []
        for index in ids:
            buffer = io.BytesIO()
            Image.fromarray(np.full((256, 256, 3), index, np.uint8)).save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        columns = {"id": list(ids), "image": pictures, "caption": [f"number {index}" for index in ids]}
        columns["shade"] = [None if index % 5 == 0 else index % 3 for index in ids]
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet", row_group_size=7)
    validation = {"every_steps": 1, "data": str(folder), "samples": 25, "seed": 3}
    return RECIPES["upsampler_256"]["debug"]().merged({"validation": validation})


def test_they_are_the_first_rows_in_order_whatever_the_batches(config: TrainConfig) -> None:
    records = HeldOut(config, CPU)
    assert records.count == 25
    whole = next(records.batches(25))
    assert whole["id"].tolist() == whole["position"].tolist() == list(range(25))
    pieces = list(records.batches(4))
    assert [len(piece["id"]) for piece in pieces] == [4] * 6 + [1]
    for name, column in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), column)
    assert torch.equal(whole["image"].float().mean(dim=(1, 2, 3)), torch.arange(25.0))
    assert records.first(3)["id"].tolist() == [0, 1, 2]
    assert len(records.first(99)["id"]) == 25


def test_any_rows_in_any_order(config: TrainConfig) -> None:
    rows = [20, 3, 4, 6, 7, 17, 18, 0, 0]
    batch = HeldOut(config, CPU).pictures(rows, BatchSpec(image_size=8))
    assert batch["id"].tolist() == rows
    assert batch["image"][:, 2, 5, 1].tolist() == rows


def test_a_column_as_text(config: TrainConfig) -> None:
    records = HeldOut(config, CPU)
    assert records.text("caption", 3) == ["number 0", "number 1", "number 2"]
    assert records.text("shade", 7) == ["", "1", "2", "0", "1", "", "0"]


def test_more_than_there_are_is_all(config: TrainConfig) -> None:
    records = HeldOut(config.merged({"validation": {"samples": 1000}}), CPU)
    assert records.count == sum(len(batch["id"]) for batch in records.batches(8)) == 30
