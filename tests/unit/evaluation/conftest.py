"""Folders of pictures as jobs write them, and evaluations run without a cluster."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unclip.evaluation.config import EvaluateConfig
from unclip.evaluation.extractors import extract_all
from unclip.evaluation.job import EvaluationJob
from unclip.models.clip import ClipModel, load_clip


def png(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_records(folder: Path, ids: Sequence[int], captions: Sequence[str | None], *, group: int = 16) -> str:
    """Two shards of noise pictures, each another one."""
    folder.mkdir(parents=True)
    half = len(ids) // 2
    for number, part in enumerate((slice(0, half), slice(half, len(ids)))):
        columns = {
            "id": pa.array(ids[part], pa.int64()),
            "image": pa.array([png(record) for record in ids[part]], pa.large_binary()),
            "caption": pa.array(captions[part], pa.string()),
        }
        pq.write_table(pa.table(columns), folder / f"data-{number:05d}.parquet", row_group_size=group)
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 records of 20 captions."""
    ids = range(60)
    return write_records(tmp_path_factory.mktemp("judged") / "pictures", ids, [f"drawing {i % 20}" for i in ids])


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 records, each with a caption of its own."""
    ids = range(1000, 1050)
    return write_records(tmp_path_factory.mktemp("judged") / "reference", ids, [f"photo {i}" for i in ids])


@pytest.fixture(scope="session")
def clip_source(tiny_bundle: str) -> str:
    return f"{tiny_bundle}/clip"


@pytest.fixture(scope="session")
def clip(clip_source: str) -> ClipModel:
    return load_clip(clip_source)


@pytest.fixture
def config(pictures: str, reference: str, clip_source: str, tmp_path: Path) -> Callable[..., EvaluateConfig]:
    def build(**fields: Any) -> EvaluateConfig:
        given = {"pictures": pictures, "reference": reference, "clip": clip_source, "out": str(tmp_path / "out")}
        return EvaluateConfig.from_dict(given | {"kid_subsets": 5, "resamples": 100} | fields)

    return build


@pytest.fixture
def make_features() -> Callable[..., int]:
    """Makes the features that are missing, of `most` units at most; how many units that were."""

    def make(job: EvaluationJob, most: int = 1000) -> int:
        job.begin()
        for extractor in job.extractors:
            extractor.setup("cpu")
        made = 0
        for name, units in job.missing().items():
            for unit in job.prepare_units(name, units[: most - made]):
                job.write(unit, extract_all(job.extractors, unit.inputs, job.config.microbatch))
                made += 1
        return made

    return make


@pytest.fixture
def evaluate(clip: ClipModel, make_features: Callable[..., int]) -> Callable[[EvaluateConfig], dict[str, Any]]:
    """All of it; the result."""

    def run(config: EvaluateConfig) -> dict[str, Any]:
        job = EvaluationJob.prepare(config, clip)
        make_features(job)
        return job.finish()

    return run
