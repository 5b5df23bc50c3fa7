"""Following a run folder: everything once, in order, and only what is new is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.run_records import add_validation, record, restart
from tests.support.s3 import object_store

from unclip.training.reporting.run_tail import RunTail
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store() as store:
        yield store.uri


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    if request.param == "local":
        return RunFolder(str(tmp_path / "run"))
    return RunFolder(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run")


def steps(tail: RunTail) -> list[int]:
    return [line["step"] for line in tail.look().records]


def test_each_look_gives_what_is_new(run: RunFolder) -> None:
    tail = RunTail(run)
    assert not tail.look()
    for step in (1, 2):
        run.append(run.metrics_uri, record(step))
    assert steps(tail) == [1, 2]
    assert not tail.look()
    run.append(run.metrics_uri, record(3))
    run.append(run.restarts_uri, restart(2))
    add_validation(run, 2, 0.5)
    news = tail.look()
    assert news.records == (record(3),)
    assert news.restarts == (restart(2),)
    assert news.validations[0]["metrics"] == {"loss": 0.5}
    assert storage.exists(news.validations[0]["samples"])
    assert not tail.look()


def test_the_cost_comes_when_it_changes_and_a_damaged_one_does_not_end_the_tail(run: RunFolder) -> None:
    tail = RunTail(run)
    storage.write_bytes(run.cost_uri, b'{"gpu_hours": 1')
    assert not tail.look()
    for cost in ({"gpu_hours": 1.0}, {"gpu_hours": 2.0}):
        storage.write_json(run.cost_uri, cost)
        assert tail.look().cost == cost
        assert not tail.look()


def test_steps_that_are_trained_again_come_once(run: RunFolder) -> None:
    tail = RunTail(run)
    for step in (10, 20, 30):
        run.append(run.metrics_uri, record(step))
    assert steps(tail) == [10, 20, 30]
    for step in (20, 30, 40):
        run.append(run.metrics_uri, record(step))
    assert steps(tail) == [40]


def test_of_lines_found_together_those_count_that_a_restart_wrote(run: RunFolder) -> None:
    for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0), (15, 4.0), (25, 5.0)):
        run.append(run.metrics_uri, record(step, loss=loss))
    assert [(line["step"], line["loss"]) for line in RunTail(run).look().records] == [(10, 1.0), (15, 4.0), (25, 5.0)]


def test_parts_on_object_stores_are_followed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_LINES", 3)
    run, seen = RunFolder(f"{bucket}/parts/run"), []
    tail = RunTail(run)
    for step in range(1, 12):
        run.append(run.metrics_uri, record(step))
        if step % 4 == 0:
            seen += steps(tail)
    assert seen + steps(tail) == list(range(1, 12))
    assert len(storage.names(run.metrics_uri)) == 4


def test_half_a_line_waits_for_its_end_or_for_another_in_its_place(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    tail, file = RunTail(run), tmp_path / "metrics.jsonl"
    run.append(run.metrics_uri, record(1))
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert steps(tail) == [1]
    with file.open("a") as stream:
        stream.write('ss": 0.1}\n')
    assert steps(tail) == [2]
    with file.open("a") as stream:
        stream.write('{"step": 3, "lo')  # its writer was killed here, and the next one writes it anew
    assert steps(tail) == []
    run.append(run.metrics_uri, record(3))
    run.append(run.metrics_uri, record(4))
    assert steps(tail) == [3, 4]


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    tail, file = RunTail(run), tmp_path / "metrics.jsonl"
    run.append(run.metrics_uri, record(1))
    assert steps(tail) == [1]
    file.write_bytes(b"x" * (file.stat().st_size - 1) + b"\n")  # the old line's bytes are gone
    run.append(run.metrics_uri, record(2))
    assert steps(tail) == [2]
