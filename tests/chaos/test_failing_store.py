"""A training run whose records, checkpoints and metrics are on an object store that fails all the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.support import faults, s3
from tests.support.cluster import assert_same_end, kill_a_worker, once
from tests.support.s3 import ObjectStore

from unclip.cluster.fit import fit
from unclip.pipelines.bundle import Bundle
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

KINDS = tuple(kind for kind in faults.PASSING if kind != faults.SLOW_DOWN_RETRY_AFTER)  # which is all waiting
STEPS = 40


@pytest.fixture
def disturbed_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """Its runs have local instances of Ray, which find it in the environment."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with s3.object_store() as store:
        yield store


def test_a_run_killed_on_a_failing_store_goes_on_to_what_the_straight_one_comes_to(
    openmoji: str, disturbed_store: ObjectStore
) -> None:
    places = disturbed_store.uri
    for name in storage.names(f"{openmoji}/64/train"):
        content = storage.read_bytes(f"{openmoji}/64/train/{name}")
        storage.write_bytes(f"{places}/faults/records/{name}", content)

    def config(name: str) -> TrainConfig:
        changes = {"run": f"{places}/faults/{name}", "bundle": f"{places}/faults/bundle-{name}"}
        loop = {"loop": {"max_steps": STEPS, "log_every": 5, "checkpoint_every_s": 0.5}}
        return RECIPES["clip"]["debug"]().merged(changes | loop | {"data": {"path": f"{places}/faults/records"}})

    fit(config("straight"))
    straight, failing = RunFolder(config("straight").run), RunFolder(config("failing").run)
    has_begun = lambda: bool(storage.names(failing.checkpoints_uri))  # noqa: E731
    with (
        disturbed_store.proxy.faults(seed=3, kinds=KINDS, rate=0.2) as plan,
        once(has_begun, kill_a_worker),
    ):
        assert fit(config("failing"))["step"] == STEPS
    assert set(plan.injected) == set(KINDS)
    assert [line["kind"] for line in failing.lines(failing.restarts_uri)] == ["failure"]
    assert [record["loss"] for record in failing.metrics()] == [record["loss"] for record in straight.metrics()]
    assert_same_end(failing, straight)
    weights = [
        Bundle.load(f"{places}/faults/bundle-{name}").load_model("clip").state_dict()
        for name in ("straight", "failing")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
