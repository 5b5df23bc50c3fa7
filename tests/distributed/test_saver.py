"""Checkpoints of several processes: other layouts, and what goes wrong while one is written.

Launches cost more than the cases in them, so that each has several; tests read the answers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.faults import STALL
from tests.support.ranks import LAUNCHER, run_ranks
from tests.support.s3 import ObjectStore, object_store
from torch import nn

from unclip.training import checkpoint, zero_state
from unclip.training.checkpoint import CheckpointError, FragmentReader
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.optim import OptimizerConfig
from unclip.training.saver import Saver
from unclip.utils import storage

BATCH, RATE = 8, 3e-3
LARGE = 3584
"""Width of a model with a state of 205 MB."""
READER_BYTES = 96 * 2**20
"""What a rank may need to read its share of that, slice by slice: 16 blocks of 4 MiB, the largest slice of a parameter, 12 MiB,
and what the allocator keeps of what was freed."""


class Model(nn.Module):
    """Odd sizes, so that partitions end inside of parameters and are padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(7, width)
        self.wide = nn.Linear(width, width + 2)
        self.outer = nn.Linear(width + 2, 5)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.wide(torch.tanh(self.inner(x)))))


@dataclass
class Output:
    loss: torch.Tensor


def new_engine(stage: int, width: int = 333, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return Engine(
        Model(width),
        OptimizerConfig(learning_rate=RATE, weight_decay=0.1, ema_decay=0.5),
        ZeroConfig(stage=stage, precision="fp32"),
        microbatch_size=BATCH // world_size,
        accumulation_steps=1,
        device=torch.device("cpu"),
    )


def train(engine: Engine, steps: range) -> Engine:
    for step in steps:
        inputs = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
        mine = inputs.chunk(engine.world_size)[engine.rank]
        output = engine.forward(lambda x=mine: Output(engine.module(x).square().mean()))  # type: ignore[misc]
        engine.backward(output.loss)
        engine.step(RATE)
    return engine


def new_saver(uri: str, engine: Engine, limit_s: float = 60.0) -> Saver:
    return Saver(uri, engine, facts={}, keep_last=2, keep_every_steps=None, limit_s=limit_s)


def save(uri: str, engine: Engine, step: int) -> None:
    saver = new_saver(uri, engine)
    saver.start({"step": step}, objective={"history": torch.arange(step)})
    saver.wait()


def resume(uri: str, stage: int, seed: int = 9) -> Engine:
    engine = new_engine(stage, seed=seed)
    newest = checkpoint.latest(uri)
    assert newest
    history = checkpoint.load(newest, engine)["history"]
    assert history.tolist() == list(range(newest.step))
    return engine


def state(uri: str, step: int) -> dict[str, torch.Tensor]:
    """The whole state in a checkpoint."""
    found = checkpoint.open_committed(checkpoint.folder(uri, step))
    assert found
    with FragmentReader(found) as reader:
        return {
            f"{kind}/{name}": reader.read(name, kind, 0, torch.Size(shape).numel())
            for name, shape in found.shapes.items()
            for kind in zero_state.KINDS
        }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Up to the rounding of sums in another order: 1/500 of a step."""
    return all(float((one[key] - other[key]).abs().max()) < RATE / 500 for key in one)


# --- what ranks run -------------------------------------------------------------------------------------------------


def two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """From what one process left (stage 3, 2 steps) to stages 1, 3, 2, a step each; then what can go wrong."""
    uri = str(folder / "one")
    for step, stage in ((2, 1), (3, 3), (4, 2), (5, 0)):
        engine = resume(uri, stage)
        uri = str(folder / f"two-{stage}")
        save(uri, engine, step)  # the same state in another layout
        save(uri, train(engine, range(step, step + 1)), step + 1)
    answers: dict[str, Any] = {"straight": [straight(rank, folder, stage) for stage in range(4)]}
    answers["full disk"] = full_disk(rank, str(folder / "full"))
    answers["missing"] = missing(rank, str(folder / "missing"))
    save(str(folder / "undisturbed"), train(new_engine(2), range(4)), 4)
    return answers


def straight(rank: int, folder: Path, stage: int) -> bool:
    """Whether a run that goes on after an asynchronous save ends as one that is resumed from it, to the bit."""
    uri = str(folder / f"straight-{stage}")
    engine = train(new_engine(stage), range(2))
    saver = new_saver(uri, engine)
    saver.start({"step": 2}, objective={"history": torch.arange(2)})
    train(engine, range(2, 4))  # while that is written
    saver.start({"step": 4}, objective={"history": torch.arange(4)})
    saver.wait()
    expected = state(uri, 4)
    dist.barrier()
    if rank == 0:
        storage.remove(checkpoint.folder(uri, 4))
    dist.barrier()
    save(uri, train(resume(uri, stage), range(2, 4)), 4)
    return same(state(uri, 4), expected)


def full_disk(rank: int, uri: str) -> dict[str, Any]:
    """Rank 1 may write no file of more than 100 kB for the time of one save."""
    engine = train(new_engine(1), range(1))
    saver = new_saver(uri, engine)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        saver.start({"step": step}, objective=None)
        train(engine, range(step, step + 1))
        error = ""
        try:
            saver.wait()
        except CheckpointError as failure:
            error = str(failure)
        if step == 2:
            message = error
            left = storage.names(uri)
            dist.barrier()  # then the next save may begin
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        else:
            assert not error
    outcomes = [[outcome.step, outcome.error, outcome.bytes > 0] for outcome in saver.finished()]
    return {"error": message, "left": left, "steps": [c.step for c in checkpoint.committed(uri)], "outcomes": outcomes}


def missing(rank: int, uri: str) -> dict[str, Any]:
    """Rank 1 does not start its part; then everyone does."""
    saver = new_saver(uri, train(new_engine(1), range(1)), limit_s=1.0)
    began, error = time.monotonic(), ""
    if rank == 0:
        saver.start({"step": 1}, objective=None)
        with pytest.raises(CheckpointError) as caught:
            saver.wait()
        error = str(caught.value)
    return {"error": error, "ended": time.monotonic() - began < 30, "left": storage.names(uri)}


def four_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What two ranks left at stage 0 goes on at stage 3; and a larger state than one rank may hold."""
    uri = str(folder / "four")
    engine = resume(str(folder / "two-0"), 3)
    save(uri, engine, 6)
    save(uri, train(engine, range(6, 7)), 7)
    large = train(new_engine(3, width=LARGE, seed=rank), range(1))
    save(str(folder / "large"), large, 1)
    newest = checkpoint.open_committed(checkpoint.folder(str(folder / "large"), 1))
    assert newest
    # At stage 1 every rank reads parts of what all have written.
    mine = [(f.name, f.start, f.numel) for f in zero_state.fragments(new_engine(1, width=LARGE))]
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = resident("VmRSS")
    with FragmentReader(newest) as reader:
        for name, start, numel in mine:
            for kind in zero_state.KINDS:
                reader.read(name, kind, start, numel)
    total = sum(entry["bytes"] for entry in newest.manifest["files"])
    return {"needed": resident("VmHWM") - before, "total": total}


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def killed_in_upload(rank: int, world_size: int, folder: Path) -> None:
    """Saves a second checkpoint until somebody ends it."""
    interrupted((folder / "address").read_text())


def killed_in_write(rank: int, world_size: int, folder: Path) -> None:
    """The system kills rank 1 in the middle of its file, without a word."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    interrupted(str(folder / "local"), limit if rank == 1 else lambda: None)


def interrupted(uri: str, before_second: Callable[[], None] = lambda: None) -> None:
    engine = train(new_engine(2), range(2))
    saver = new_saver(uri, engine)
    saver.start({"step": 2}, objective={"history": torch.arange(2)})
    saver.wait()
    train(engine, range(2, 4))
    before_second()
    saver.start({"step": 4}, objective={"history": torch.arange(4)})
    saver.wait()


def after_kills(rank: int, world_size: int, folder: Path) -> list[Any]:
    """The next start, on either store: what is there, and whether it ends as the undisturbed run."""
    answers = []
    for uri in ((folder / "address").read_text(), str(folder / "local")):
        engine = new_engine(2, seed=5)
        saver = new_saver(uri, engine)
        newest = checkpoint.latest(uri)
        assert newest
        left = storage.names(uri)
        checkpoint.load(newest, engine)
        train(engine, range(newest.step, 4))
        saver.start({"step": 4}, objective=None)
        saver.wait()
        answers.append([newest.step, left, same(state(uri, 4), state(str(folder / "undisturbed"), 4))])
    return answers


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what this one process left after two steps at stage 3."""
    folder = tmp_path_factory.mktemp("saver")
    save(str(folder / "one"), train(new_engine(3), range(2)), 2)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, folder)


@pytest.fixture(scope="module")
def four(folder: Path, two: object) -> list[dict[str, Any]]:
    return run_ranks(four_ranks, 4, folder)


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The states of one process that trains straight on, by step."""
    engine, states = new_engine(0), {}
    for step in range(7):
        save(str(folder / "truth"), train(engine, range(step, step + 1)), step + 1)
        states[step + 1] = state(str(folder / "truth"), step + 1)
    return states


def test_any_layout_goes_on_from_any_other(
    two: object, four: object, folder: Path, truth: dict[int, dict[str, torch.Tensor]]
) -> None:
    """1 rank -> 2 -> 4 -> 1 by stages 3 -> 1 -> 3 -> 2 -> 0 -> 3 -> 2: weights, moments and averages to the bit, and a step
    in each layout is the step of the undisturbed run."""
    places = ["one", "two-1", "two-3", "two-2", "two-0", "four"]
    for step, (before, after) in enumerate(itertools.pairwise(places), start=2):
        assert same(state(str(folder / before), step), state(str(folder / after), step)), after
        assert close(state(str(folder / after), step + 1), truth[step + 1]), after
    engine = resume(str(folder / "four"), 2)
    save(str(folder / "one again"), engine, 7)
    assert same(state(str(folder / "four"), 7), state(str(folder / "one again"), 7))
    assert engine.steps == 7


def test_a_resumed_run_is_a_straight_one_to_the_bit(two: list[dict[str, Any]]) -> None:
    assert [answer["straight"] for answer in two] == [[True] * 4] * 2


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(two: list[dict[str, Any]]) -> None:
    for answer in two:  # every rank learns of it
        assert "checkpoint of step 2: rank 1 could not write its part" in answer["full disk"]["error"]
        assert "File too large" in answer["full disk"]["error"]
        assert answer["full disk"]["left"] == ["step-00000001"]
        assert answer["full disk"]["steps"] == [1, 3]
    error = two[0]["full disk"]["error"]
    assert two[0]["full disk"]["outcomes"] == [[1, None, True], [2, error, False], [3, None, True]]
    assert two[1]["full disk"]["outcomes"] == []


def test_a_rank_that_delivers_nothing_is_named(two: list[dict[str, Any]]) -> None:
    answer = two[0]["missing"]
    assert "checkpoint of step 1: rank 1 delivered nothing within 1 s" in answer["error"]
    assert answer["ended"]
    assert answer["left"] == []


def test_a_reader_holds_some_blocks_and_the_slice_under_way(four: list[dict[str, Any]]) -> None:
    for answer in four:
        assert answer["needed"] < READER_BYTES < answer["total"] / 2


def test_a_kill_in_the_middle_of_a_save_costs_that_save(two: object, folder: Path) -> None:
    """kill -9 during an upload, and during a write: the next start deletes what is left, goes on from the checkpoint before
    and ends where the undisturbed run does."""
    with object_store() as store:
        uri = f"{store.uri}/killed"
        (folder / "address").write_text(uri)
        kill_in_upload(folder, store)
        kill_in_write(folder)
        for place in (uri, str(folder / "local")):
            assert storage.names(place) == ["step-00000002", "step-00000004"]
            left = storage.names(checkpoint.folder(place, 4))
            assert any(name.startswith("rank-00000") for name in left)
            assert "manifest.json" not in left
        answers = run_ranks(after_kills, 2, folder)
    assert answers == [[[2, ["step-00000002"], True]] * 2] * 2


def kill_in_upload(folder: Path, store: ObjectStore) -> None:
    of_rank_1 = {"kinds": (STALL,), "methods": ("PUT", "POST"), "containing": "step-00000004/rank-00001", "most": 1000}
    with store.proxy.faults(**of_rank_1) as plan:
        ranks = start(killed_in_upload, folder)
        try:
            wait_for(lambda: plan.injected[STALL] > 0 and any("step-00000004/rank-00000" in r for r in plan.requests))
            wait_for(lambda: storage.names(f"{store.uri}/killed/step-00000004") != [])
            ranks[1].send_signal(signal.SIGKILL)
            assert ranks[1].wait(30) == -signal.SIGKILL
        finally:
            end(ranks)


def kill_in_write(folder: Path) -> None:
    ranks = start(killed_in_write, folder)
    try:
        assert ranks[1].wait(120) == -signal.SIGXFSZ
        wait_for(
            lambda: any(
                ".tmp" not in name and "rank-00000" in name
                for name in storage.names(str(folder / "local" / "step-00000004"))
            )
        )
    finally:
        end(ranks)


def start(function: Callable[..., None], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks that are going to be killed."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "platform"), str(root)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    meeting = folder / hashlib.sha256(function.__name__.encode()).hexdigest()
    meeting.mkdir()
    arguments = [LAUNCHER, __file__, function.__name__]
    return [
        subprocess.Popen([sys.executable, *map(str, (*arguments, rank, 2, folder, meeting))], env=environment)
        for rank in range(2)
    ]


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.kill()
        process.wait(30)


def wait_for(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
