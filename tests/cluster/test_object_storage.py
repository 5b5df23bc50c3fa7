"""A run whose records, run folder and bundle are all on object storage."""

from __future__ import annotations

import pytest

from unclip.cluster.fit import fit
from unclip.data.manifest import DataError
from unclip.pipelines.bundle import Bundle
from unclip.recipes import RECIPES
from unclip.training import checkpoint
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


def test_everything_on_object_storage(openmoji: str, object_store: str) -> None:
    for name in storage.names(f"{openmoji}/64/train"):
        content = storage.read_bytes(f"{openmoji}/64/train/{name}")
        storage.write_bytes(f"{object_store}/records/{name}", content)
    places = {"run": f"{object_store}/run", "bundle": f"{object_store}/bundle"}
    config = RECIPES["clip"]["debug"]().merged(places | {"data": {"path": f"{object_store}/records"}})
    assert fit(config)["step"] == 2
    run = RunFolder(config.run)
    assert [record["step"] for record in run.metrics()] == [1, 2]
    newest = checkpoint.latest(run.checkpoints_uri)
    assert newest is not None
    assert newest.step == 2
    Bundle.load(f"{object_store}/bundle").load_model("clip")
    longer = config.merged({"loop": {"max_steps": 3}})
    assert fit(longer)["step"] == 3


def test_a_missing_bucket_is_named(object_store: str) -> None:
    config = RECIPES["clip"]["debug"]().merged({"data": {"path": "s3://no-such-bucket/records"}})
    with pytest.raises(DataError, match="no-such-bucket"):
        fit(config)
