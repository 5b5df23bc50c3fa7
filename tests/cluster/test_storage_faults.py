"""A training run whose records, checkpoints and metrics are on an object store that fails all the time."""

from __future__ import annotations

import torch
from tests.support import faults
from tests.support.cluster import kill_a_worker, once, step_of
from tests.support.s3 import ObjectStore

from unclip.cluster.fit import fit
from unclip.pipelines.bundle import Bundle
from unclip.recipes import RECIPES
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

KINDS = tuple(kind for kind in faults.PASSING if kind != faults.SLOW_DOWN_RETRY_AFTER)  # which is all waiting


def test_a_run_killed_on_a_failing_store_goes_on_to_what_the_straight_one_comes_to(
    openmoji: str, disturbed_store: ObjectStore
) -> None:
    places = disturbed_store.uri
    for name in storage.names(f"{openmoji}/64/train"):
        content = storage.read_bytes(f"{openmoji}/64/train/{name}")
        storage.write_bytes(f"{places}/faults/records/{name}", content)

    def config(name: str) -> TrainConfig:
        changes = {"run": f"{places}/faults/{name}", "bundle": f"{places}/faults/bundle-{name}"}
        data = {"data": {"path": f"{places}/faults/records"}}
        return RECIPES["clip"]["debug"]().merged(changes | data | {"loop": {"max_steps": 5}})

    fit(config("straight"))
    run = RunFolder(config("failing").run)
    with (
        disturbed_store.proxy.faults(seed=3, kinds=KINDS, rate=0.2) as plan,
        once(lambda: step_of(run) >= 2, kill_a_worker),
    ):
        assert fit(config("failing"))["step"] == 5
    assert set(plan.injected) == set(KINDS)
    straight, failing = RunFolder(config("straight").run), RunFolder(config("failing").run)
    assert [record["loss"] for record in failing.metrics()] == [record["loss"] for record in straight.metrics()]
    newest = checkpoint.latest(failing.checkpoints_uri)
    assert newest is not None
    assert newest.step == 5
    weights = [
        Bundle.load(f"{places}/faults/bundle-{name}").load_model("clip").state_dict()
        for name in ("straight", "failing")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
