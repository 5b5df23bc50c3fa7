"""Batches on the real bulk job: every line is answered once, though their actor is killed, and processes that speak HTTP go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from openai import OpenAI
from tests.support.batches import client_of, line, lines_of, running_batches, submit, wait_for
from tests.support.bundles import save_tiny_bundle

from unclip.cluster.makers import DRIVER_FILE
from unclip.cluster.serve.batches import NAMESPACE, RayBatchRunner, RayMaking
from unclip.generation.bulk.config import GenerateConfig
from unclip.pipelines.bundle import BundleError
from unclip.serving.batches import batches as batches_module
from unclip.serving.batches.work import JobRefusedError
from unclip.serving.config import ServeConfig
from unclip.utils import storage

NAMES = [str(number) for number in range(48)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


@pytest.fixture
def config(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeConfig:
    """Units of four lines, which last long enough to be disturbed."""
    monkeypatch.setattr(batches_module, "_LINES_PER_UNIT", 4)
    monkeypatch.setattr(batches_module, "LOOK_S", 0.5)
    batches = {"folder": str(tmp_path / "batches")}
    return ServeConfig.from_dict({"bundle": bundle, "device": "cpu", "batches": batches})


@pytest.fixture(autouse=True)
def _nobody_stays() -> Iterator[None]:
    yield
    eventually(lambda: not actors() and not processes("BatchActor") and not processes("Maker"))


def actors() -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def processes(name: str) -> list[psutil.Process]:
    """Of the Ray instance, whose name has `name` in it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in process.name() + " ".join(process.cmdline()):
                found.append(process)
    return found


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_come_on(client: OpenAI, batch_id: str) -> None:
    """Some lines are done, and not all."""
    batch = wait_for(client, batch_id, lambda batch: bool(batch.request_counts and batch.request_counts.completed))
    assert batch.status == "in_progress"


def slow(name: str) -> dict[str, object]:
    return line(name, prompt=f"drawing number {name}", seed=int(name), num_inference_steps=40)


def test_all_lines_are_answered_once_though_actor_and_server_go(config: ServeConfig) -> None:
    """The actor's whole process is killed, then the server ends, and another one finds the batch."""
    runner = RayBatchRunner(config)
    with running_batches(config, runner) as url:
        client = client_of(url)
        batch_id = submit(client, [slow(name) for name in NAMES] + [line("bad", prompt="")]).id
        has_come_on(client, batch_id)
        assert actors() == [batch_id]
        [process] = processes("BatchActor")
        process.kill()
        eventually(lambda: not process.is_running())
    with running_batches(config, runner) as url:
        client = client_of(url)
        batch = wait_for(client, batch_id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 49, "completed": 48, "failed": 1}
        answers, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert [answer["custom_id"] for answer in answers] == NAMES
    assert [answer["response"]["body"]["data"][0]["seed"] for answer in answers] == list(map(int, NAMES))
    assert [error["custom_id"] for error in errors] == ["bad"]
    assert "pictures" not in storage.names(f"{config.batches.folder}/batches/{batch_id}")


def test_cancelled_batches_hand_out_what_is_done_and_leave_nothing_at_work(
    config: ServeConfig, object_store: str
) -> None:
    """All of it on an object store; one is at work, and another waits for its turn."""
    config = config.merged({"batches": {"folder": f"{object_store}/cancelled"}})
    with running_batches(config, RayBatchRunner(config)) as url:
        client = client_of(url)
        first = submit(client, [slow(name) for name in NAMES]).id
        has_come_on(client, first)
        second = submit(client, [line("later", prompt="a")]).id
        wait_for(client, second, lambda batch: batch.status == "in_progress")
        assert actors() == [first]
        client.batches.cancel(first)
        client.batches.cancel(second)
        batches = [wait_for(client, batch_id) for batch_id in (first, second)]
        assert [batch.status for batch in batches] == ["cancelled"] * 2
        done = lines_of(client, batches[0].output_file_id)
        left, waiting = (lines_of(client, batch.error_file_id) for batch in batches)
    assert 0 < len(done) < len(NAMES)
    assert sorted(int(each["custom_id"]) for each in [*done, *left]) == list(range(len(NAMES)))
    assert [each["custom_id"] for each in waiting] == ["later"]
    assert {each["error"]["code"] for each in [*left, *waiting]} == {"batch_cancelled"}


def test_what_the_bulk_job_refuses_is_not_tried_again(tmp_path: Path) -> None:
    job = GenerateConfig(bundle=str(tmp_path), prompt="a", out=str(tmp_path / "out"))
    with pytest.raises(JobRefusedError, match="is no bundle"):
        assert RayMaking(job).wait(60)
    (tmp_path / "out").mkdir()
    storage.write_json(str(tmp_path / "out" / DRIVER_FILE), {})
    with pytest.raises(BundleError):  # another driver has the folder, which it may be about
        assert RayMaking(job).wait(60)
