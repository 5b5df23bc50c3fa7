"""Jobs over a tiny bundle, run without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.maker import PictureMaker

SMALL = {"up_to": 16, "decoder": {"num_inference_steps": 2}, "prior": {"num_inference_steps": 2}}


@pytest.fixture
def config(tiny_bundle: str, tmp_path: Path) -> Callable[..., GenerateConfig]:
    def build(**fields: Any) -> GenerateConfig:
        given = {"bundle": tiny_bundle, "out": str(tmp_path / "out"), "device": "cpu", "options": SMALL, **fields}
        return GenerateConfig.from_dict(given)

    return build


@pytest.fixture
def run() -> Callable[[GenerateConfig], dict[str, Any]]:
    """Makes what is missing; the manifest."""

    def run(config: GenerateConfig) -> dict[str, Any]:
        job = BulkJob.prepare(config)
        missing = job.begin()
        if missing:
            maker = PictureMaker(job.config)
            maker.setup()
            for unit in missing:
                maker.process(unit)
            maker.close()
        return job.finish()

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def maker() -> Iterator[Callable[[BulkJob], PictureMaker]]:
    """One for each job's folder, loaded once."""
    made: dict[str, PictureMaker] = {}

    def of(job: BulkJob) -> PictureMaker:
        if job.config.out not in made:
            made[job.config.out] = PictureMaker(job.config)
            made[job.config.out].setup()
        return made[job.config.out]

    yield of
    for each in made.values():
        each.close()
