"""How often a run is started again, after which pauses, and what is written down about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from unclip.cluster import restarts
from unclip.cluster.failures import RunFailed, describe, is_final
from unclip.cluster.preflight import PreflightError
from unclip.cluster.restarts import Restarts
from unclip.data.manifest import DataError, ReadError
from unclip.training.checkpoint import CheckpointError, SaveError
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", slept.append)
    return slept


def commit(run: RunFolder, step: int) -> None:
    """The smallest folder that counts as a checkpoint."""
    manifest: dict[str, Any] = {"format": 3, "state": {"step": step}, "files": []}
    storage.write_json(f"{run.checkpoints_uri}/step-{step:08d}/manifest.json", manifest)


def groups(run: RunFolder, known: Restarts, *ends: Exception | str | int | None) -> Callable[[], dict[str, Any]]:
    """Groups that end so, one after the other; a number is the step of a checkpoint that is made meanwhile."""
    waiting: Iterator[Exception | str | int | None] = iter(ends)

    def run_group() -> dict[str, Any]:
        known.newest_checkpoint()
        known.begin(2)
        end = next(waiting)
        while isinstance(end, int):
            commit(run, end)
            end = next(waiting)
        if isinstance(end, Exception):
            raise end
        return {"stopped": end, "step": 99}

    return run_group


def died(**errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank[1:]): error for rank, error in errors.items()})


def test_failures_in_a_row_are_counted_and_pauses_grow(run: RunFolder, pauses: list[float]) -> None:
    known = Restarts(run, "decoder", max_failures=3)
    errors = [OSError(f"the store does not answer ({number})") for number in range(4)]
    with pytest.raises(RunFailed, match=r"(?s)\(3\).*max_failures = 3.*no checkpoint yet; the same command") as failed:
        known.until_finished(groups(run, known, *errors))
    assert failed.value.__cause__ is errors[3]
    assert pauses == list(restarts.PAUSES_S)
    assert sum(pauses) > 60  # a store that is away for a minute
    reasons = [line["reason"] for line in run.lines(run.restarts_uri)]
    assert reasons == [f"OSError: the store does not answer ({number})" for number in range(3)]


def test_a_newer_checkpoint_forgives(run: RunFolder, pauses: list[float]) -> None:
    known = Restarts(run, "decoder", max_failures=1)
    ends = [10, OSError("a"), 20, OSError("b"), 30, OSError("c"), None]
    assert known.until_finished(groups(run, known, *ends)) == {"step": 99}
    assert [line["step"] for line in run.lines(run.restarts_uri)] == [10, 20, 30]
    assert set(pauses) == {restarts.PAUSES_S[0]}


def test_stops_are_no_failures(run: RunFolder, pauses: list[float]) -> None:
    known = Restarts(run, "decoder", max_failures=0)
    ends = [10, "preemption of node 10.0.0.3 (abcdef01) in 25 s", 11, "resize to 4 workers", None]
    assert known.until_finished(groups(run, known, *ends)) == {"step": 99}
    lines = run.lines(run.restarts_uri)
    assert [(line["kind"], line["step"], line["world_size"]) for line in lines] == [
        ("preemption", 10, 2),
        ("resize", 11, 2),
    ]
    assert pauses == []


def test_what_would_come_again_ends_the_run_and_is_named_before_what_followed_from_it(
    run: RunFolder, pauses: list[float]
) -> None:
    known = Restarts(run, "decoder", max_failures=3)
    error = died(
        r0=RuntimeError("gloo/transport/tcp: Connection closed by peer"), r1=DataError("id 7: a picture is cut off")
    )
    commit(run, 40)
    with pytest.raises(RunFailed, match=r"(?s)^worker 1: DataError: id 7.*\(then workers 0\).*at step 40"):
        known.until_finished(groups(run, known, error))
    assert pauses == []


def test_a_damaged_checkpoint_between_groups_ends_the_run_with_its_name(run: RunFolder, pauses: list[float]) -> None:
    known = Restarts(run, "decoder", max_failures=3)
    commit(run, 40)
    storage.write_bytes(f"{run.checkpoints_uri}/step-00000040/manifest.json", b"{")
    with pytest.raises(RunFailed, match=r"(?s)^CheckpointError: .*step-00000040/manifest.json is damaged"):
        known.until_finished(groups(run, known, None))
    assert pauses == []


def test_no_room_is_a_refusal_at_first_and_a_failed_run_later(run: RunFolder, pauses: list[float]) -> None:
    no_room = PreflightError("the run does not fit the cluster")
    known = Restarts(run, "decoder", max_failures=3)
    with pytest.raises(PreflightError):
        known.until_finished(groups(run, known, no_room))
    with pytest.raises(RunFailed, match=r"(?s)^preemption of node n\n.*does not fit.*stands at step 10"):
        known.until_finished(groups(run, known, 10, "preemption of node n", no_room))


def test_the_nearest_to_the_root_is_told() -> None:
    collateral, death = RuntimeError("[rank0]: Connection reset by peer"), RayActorError()
    assert describe(died(r0=collateral, r1=death)).startswith("worker 1: the process died")
    assert describe(died(r0=death, r1=ValueError("that went wrong"))).startswith(
        "worker 1: ValueError: that went wrong"
    )
    assert not is_final(died(r0=collateral, r1=death))
    assert is_final(died(r0=TypeError("our own mistake")))
    assert is_final(died(r0=CheckpointError("damaged")))
    assert not is_final(died(r0=SaveError("the disk is full"), r1=death))
    assert not is_final(died(r0=ReadError("the store does not answer")))


def test_a_store_that_takes_no_lines_ends_no_run(run: RunFolder, pauses: list[float], tmp_path: Path) -> None:
    known = Restarts(run, "decoder", max_failures=1)
    storage.make_folder(run.restarts_uri)  # where a file should be
    assert known.until_finished(groups(run, known, OSError("x"), None)) == {"step": 99}
