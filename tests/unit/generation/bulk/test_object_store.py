"""Prompts from an object store, pictures to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.s3 import ObjectStore, object_store

from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.outputs import read_png
from unclip.utils import storage


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_a_job_on_an_object_store_is_gone_on_with(
    store: ObjectStore, config: Callable[..., GenerateConfig], run: Callable[..., dict[str, Any]], form: str
) -> None:
    prompts, out = f"{store.uri}/bulk/{form}/prompts.txt", f"{store.uri}/bulk/{form}/out"
    storage.write_bytes(prompts, b"a dog\na cat\nx\x00\n")
    settings = config(prompts=prompts, out=out, format=form, prompts_per_shard=1)
    manifest = run(settings)
    counts = manifest["counts"]
    assert (counts["done"], counts["quarantined"], counts["pictures"]) == (2, 1, 2)
    job = BulkJob.prepare(settings)
    assert job.begin() == []
    assert read_png(storage.join(out, "grid.png")).ndim == 3
    lost = {"folder": "16/00001-0.png", "parquet": "data-00001.parquet", "webdataset": "data-00001.tar"}[form]
    storage.remove(storage.join(out, lost))
    assert [unit.index for unit in job.begin()] == [1]
    assert storage.size(storage.join(out, "manifest.json")) is None
    assert run(settings)["counts"] == counts
    assert storage.size(storage.join(out, lost))
