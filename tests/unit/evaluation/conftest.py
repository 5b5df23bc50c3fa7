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
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.support.judge import judge_config, write_squares

from unclip.evaluation.config import EvaluateConfig, EvaluatePicturesConfig
from unclip.evaluation.extractors import extract_all
from unclip.evaluation.feature_folder import features_table
from unclip.evaluation.inception import InceptionFeatures
from unclip.evaluation.job import EvaluationJob
from unclip.evaluation.judge.job import train_judge
from unclip.models.clip import ClipModel, load_clip


def png(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_records(
    folder: Path,
    ids: Sequence[int],
    captions: Sequence[str | None],
    *,
    group: int = 16,
    size: tuple[int, int] = (24, 20),
) -> str:
    """Two shards of noise pictures, each another one."""
    folder.mkdir(parents=True)
    half = len(ids) // 2
    for number, part in enumerate((slice(0, half), slice(half, len(ids)))):
        columns = {
            "id": pa.array(ids[part], pa.int64()),
            "image": pa.array([png(record, size) for record in ids[part]], pa.large_binary()),
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


@pytest.fixture(scope="session")
def inception() -> InceptionFeatures:
    """With random weights that let pictures through."""
    torch.manual_seed(0)
    model = InceptionFeatures().eval().requires_grad_(False)
    for name, value in model.network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.1)
    return model


@pytest.fixture(scope="session")
def inception_weights(inception: InceptionFeatures, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("inception") / "inception.safetensors")
    save_file({name: value.contiguous() for name, value in inception.network.state_dict().items()}, path)
    return path


@pytest.fixture
def config(pictures: str, reference: str, clip_source: str, tmp_path: Path) -> Callable[..., EvaluatePicturesConfig]:
    def build(**fields: Any) -> EvaluatePicturesConfig:
        given = {"pictures": pictures, "reference": reference, "clip": clip_source, "out": str(tmp_path / "out")}
        return EvaluatePicturesConfig.from_dict(given | {"kid_subsets": 5, "resamples": 100} | fields)

    return build


@pytest.fixture
def make_features() -> Callable[..., int]:
    """Makes the features that are missing, of `most` units at most; how many units that were."""

    def make(job: EvaluationJob, most: int = 1000) -> int:
        job.begin()
        made = 0
        for name, units in job.missing().items():
            networks = job.subject.networks(name)
            for network in networks:
                network.setup("cpu")
            for unit in job.prepare_units(name, units[: most - made]):
                columns = extract_all(networks, unit.inputs, job.config.microbatch)
                job.write(name, unit.number, features_table(unit.ids, unit.captions, columns))
                made += 1
        return made

    return make


@pytest.fixture
def evaluate(make_features: Callable[..., int]) -> Callable[[EvaluateConfig], dict[str, Any]]:
    """All of it; the result."""

    def run(config: EvaluateConfig) -> dict[str, Any]:
        job = EvaluationJob.prepare(config)
        make_features(job)
        return job.finish()

    return run


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """240 records of squares, each with a caption of its own."""
    return write_squares(tmp_path_factory.mktemp("squares") / "records", range(240), seed=0)


@pytest.fixture(scope="session")
def squares_judge(squares: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A judge that has learned them."""
    out = tmp_path_factory.mktemp("squares") / "judge"
    train_judge(judge_config(squares, out))
    return str(out)
