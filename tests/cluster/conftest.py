"""One local Ray instance for all cluster tests, small records whose pictures tell their id, and a tiny CLIP."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.support import s3
from tests.support.s3 import ObjectStore

from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import stage_config_from_dict

ROWS_OF_FILES = (40, 30, 50)
ROWS_OF_GROUPS = 16
PIXELS = 16


@pytest.fixture(scope="session")
def disturbed_store() -> Iterator[ObjectStore]:
    """An S3-compatible server of our own behind a proxy that can disturb it, found through the environment."""
    with s3.object_store() as store:
        yield store


@pytest.fixture(scope="session")
def object_store(disturbed_store: ObjectStore) -> str:
    """Address of a bucket."""
    return disturbed_store.uri


@pytest.fixture(scope="session", autouse=True)
def ray_session(object_store: str) -> Iterator[None]:
    """An instance of our own, whatever cluster the environment points to; its workers find the object store as we do."""
    from unclip.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with session.session():
            yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays(ray_session: None) -> Iterator[None]:
    """Ray ends an actor when nobody holds it any more; what cycles hold would keep its CPU from the tests to come."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of 120 records in 3 shards; every pixel of record i has the value i in red, so a picture tells its id."""
    return _write_records(tmp_path_factory.mktemp("records"), 0, ROWS_OF_FILES)


@pytest.fixture(scope="session")
def more_records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `records`: those from 120 to 169, in a folder of their own."""
    return _write_records(tmp_path_factory.mktemp("more_records"), sum(ROWS_OF_FILES), (20, 30))


def _write_records(folder: Path, first: int, rows_of_files: tuple[int, ...]) -> str:
    for number, rows in enumerate(rows_of_files):
        ids = range(first, first + rows)
        columns = {
            "id": pa.array(ids, pa.int64()),
            "image": pa.array([_png(index) for index in ids], pa.large_binary()),
            "caption": [f"drawing number {index}" for index in ids],
            "extra": [index * 0.5 for index in ids],
        }
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet", row_group_size=ROWS_OF_GROUPS)
        first += rows
    return str(folder)


def _png(index: int) -> bytes:
    noise = np.random.default_rng(index).integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)
    noise[..., 0] = index
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an exported `clip` stage with random weights."""
    architecture = {
        "embed_dim": 8,
        "image_size": PIXELS,
        "vision_layers": 1,
        "vision_width": 16,
        "vision_patch_size": 8,
        "vision_head_width": 8,
        "context_length": 16,
        "text_width": 16,
        "text_heads": 2,
        "text_layers": 1,
    }
    config = stage_config_from_dict({"kind": "clip", "architecture": architecture})
    torch.manual_seed(0)
    model = config.build()
    bundle = tmp_path_factory.mktemp("bundle")
    reference = ClipReference(source="clip", fingerprint=str(model.fingerprint))
    save_stage(str(bundle), config, tensors=model.state_dict(), clip=reference, provenance={})
    return str(Path(bundle) / "clip")
